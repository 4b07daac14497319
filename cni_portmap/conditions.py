"""conditionsV4 and conditionsV6: a list of words -> nft match text; iptables' -s, -d and -i are translated.

Loaded only for a configuration that has some. A condition may look at a packet, and do nothing with it: so statements
are refused here, whatever nft's scanner would make of the letters around them, and so are host names. nft itself judges
the rest, see `verbs.add`. Source: nft(8), EXPRESSIONS and STATEMENTS; iptables(8).
"""
from .attachment import parse_ip
from .cni import ConfigError


_TEXT = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \t._:/-,@!=<>&|^*+\"{}")

_BRACES = dict.fromkeys(map(ord, "{},"), " ")
_NOT_LETTERS = dict.fromkeys((ord(letter) for letter in _TEXT if not letter.isalpha()), " ")

# nft(8), STATEMENTS: the words that do something with a packet. A condition only looks at it.
_STATEMENTS = frozenset("""accept add comment continue count counter delete dnat drop dup flow flush fwd goto insert
jump last limit log map masquerade meter notrack queue quota redirect reject replace reset return set snat synproxy
tproxy update vmap xt""".split())

_IPTABLES = {"-s": "saddr", "--source": "saddr", "--src": "saddr",
             "-d": "daddr", "--destination": "daddr", "--dst": "daddr", "-i": "", "--in-interface": ""}
_INSTEAD = {"-p": "meta l4proto tcp", "--protocol": "meta l4proto tcp", "--sport": "tcp sport 1024-65535",
            "--dport": "tcp dport 80", "--mark": "meta mark 0x1", "--src-range": "ip saddr 10.0.0.1-10.0.0.9",
            "--dst-range": "ip daddr 10.0.0.1-10.0.0.9", "--mac-source": "ether saddr 02:00:00:00:00:01",
            "--ctstate": "ct state new", "--match-set": "ip saddr { 10.0.0.1, 10.0.0.2 }"}


def parse_conditions(value: list[object], key: str) -> str:
    """nft match text from the value of conditionsV4 or conditionsV6 (`key`).

    Raises ConfigError, naming the key and, where one is wrong in itself, the word's place.
    """
    ip = "ip" if key == "conditionsV4" else "ip6"
    words = []
    for index, item in enumerate(value):
        if type(item) is not str:
            raise ConfigError(f"{key}[{index}]")
        if not _TEXT.issuperset(item):
            raise ConfigError(f"{key}[{index}]",
                              "nft match text, without ';', '#', line ends or other special characters")
        words += item.split()
    if any(word[0] == "-" or word == "!" for word in words):
        words = _from_iptables(words, ip, key)
    inside = False
    for word in words:
        if '"' in word and (word.count('"') != 2 or word[0] != '"' or word[-1] != '"'):
            raise ConfigError(key, f"a quoted word, such as \"eth0\", in place of {word}")
        for brace in (letter for letter in word if letter in "{}"):
            if inside == (brace == "{"):
                raise ConfigError(key, "nft match text with balanced braces, not nested")
            inside = not inside
        for piece in word.translate(_BRACES).split():
            if '"' not in piece and not _is_literal(piece):
                for letters in piece.translate(_NOT_LETTERS).split():
                    if statement := _statement_in(letters.lower()):
                        raise ConfigError(key, f"nft match text only; {statement!r} is not a match")
    if inside:
        raise ConfigError(key, "nft match text with balanced braces, not nested")
    _refuse_host_names(words, key)
    return " ".join(words)


# nft(8), EXPRESSIONS: the words that begin an expression, wherever they stand; and those that mean an address then.
_BEGIN = frozenset("""ah arp cgroup comp ct dccp esp ether fib icmp icmpv6 igmp iif iifgroup iifname iiftype ip ip6
ipsec jhash mark meta oif oifgroup oifname oiftype pkttype rt sctp skgid skuid socket symhash tcp th udp udplite
vlan""".split())
_ADDRESSES = frozenset("saddr daddr nexthop taddr group addr".split())
_NO_ADDRESSES = ("ether", "fib")  # theirs is a hardware address, or a question
_OPERATORS = frozenset("{ } , = ! < > & | ^ eq ne lt gt le ge and or xor".split())
_APART = {ord(letter): f" {letter} " for letter in "{},=!<>&|^"}


def _refuse_host_names(words: list[str], key: str) -> None:
    """Raise ConfigError for a name in an address's place: nft would ask DNS, now and for good.

    In a concatenation each place has its own kind, so an interface or a service beside an address keeps its name.
    """
    kinds: list[bool] = []  # of each part of the expression: whether it is an address
    part, first, last = 0, "", ""  # of a value; the word that began the expression, the word before
    for word in words:
        for token in [word] if '"' in word else word.translate(_APART).split():
            name = token.lower()
            if token == ".":
                part += 1
            elif token in _OPERATORS:
                part = part if token == "}" else 0
            elif name in _ADDRESSES and (last in _BEGIN or last in ("original", "reply")):
                kinds[-1:] = [first not in _NO_ADDRESSES]
            elif last in ("meta", "ct") or (last in _BEGIN and '"' not in token and name not in _BEGIN
                                            and not _is_address(token)):
                pass  # what of it is asked for, such as dport
            elif name in _BEGIN and last not in _ADDRESSES and (last not in _OPERATORS or last == "}"):
                kinds = [*kinds, False] if last == "." else [False]
                first, part = name, 0
            elif (kinds[part] if part < len(kinds) else any(kinds)) and not _is_address(token):
                raise ConfigError(key, f"an address in place of {token}; host names are not resolved")
            last = name


def _is_address(token: str) -> bool:
    """Whether a token is an address, a range or a prefix of one, a mask, or a set."""
    for piece in token.replace("/", "-").split("-"):
        if piece and piece[0] != "@" and not piece.isdecimal():
            try:
                parse_ip(piece, "")
            except ConfigError:
                return piece[:2] == "0x" and _is_literal(piece)
    return True


def _statement_in(letters: str) -> str:
    """The statement that nft reads in letters, "" for none: 80accept is 80 accept for it, and 0xfflog is 0xff log."""
    rest = letters.removeprefix("x")
    while rest[:1] and rest not in _STATEMENTS and rest[0] in "abcdef":
        rest = rest[1:]
    return letters if letters in _STATEMENTS else rest if rest in _STATEMENTS else ""


def _is_literal(piece: str) -> bool:
    """Whether `piece` is a number or an address, which may hold letters (0xadd, 2001:add::/32)."""
    try:
        int(piece, 0)
        return True
    except ValueError:
        pass
    host, _, length = piece.partition("/")
    try:
        parse_ip(host, "")
        return ":" in host and (not length or (length.isascii() and length.isdigit()))
    except ConfigError:
        return False


def _from_iptables(words: list[str], ip: str, key: str) -> list[str]:
    """nft's words for iptables' `[!] -s/-d/-i value`, the forms that the reference plugin documents."""
    translated = []
    rest = iter(words)
    for word in rest:
        negated = word == "!"
        option = next(rest, "") if negated else word
        if option not in _IPTABLES:
            raise ConfigError(key, f"nft match text in place of iptables' {option!r}, "
                               f"for example {_INSTEAD.get(option, f'{ip} saddr 10.0.0.0/8')!r}")
        value = next(rest, "")
        if not value or value[0] in "-!":
            raise ConfigError(key, f"a value after {option}")
        field = f"{ip} {_IPTABLES[option]}"
        if not _IPTABLES[option]:
            field, value = "iifname", '"' + (value[:-1] + "*" if value[-1] == "+" else value) + '"'
        elif "," in value:
            value = "{ " + value.replace(",", ", ") + " }"
        translated += [*field.split(), *(["!="] if negated else []), *value.split()]
    return translated
