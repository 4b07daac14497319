# Completion of cni-portmap for bash.
_cni_portmap() {
    local word=${COMP_WORDS[COMP_CWORD]} options
    case ${COMP_WORDS[1]-} in
        list) options="--port --container --network --json --help" ;;
        restore) options="--dry-run --cache --plugin --base-only --json --help" ;;
        gc) options="--dry-run --json --help" ;;
        teardown) options="--force --dry-run --json --help" ;;
        validate) options="--plugin --json --help" ;;
        version) options="--json --help" ;;
        *) options="list restore gc teardown validate version --help" ;;
    esac
    [ "$COMP_CWORD" -gt 1 ] || options="list restore gc teardown validate version --help"
    mapfile -t COMPREPLY < <(compgen -W "$options" -- "$word")
    [ ${#COMPREPLY[@]} -gt 0 ] || mapfile -t COMPREPLY < <(compgen -f -- "$word")
}
complete -F _cni_portmap cni-portmap
