/*
 * The bundle's program: the interpreter, with the modules of a successful call frozen in (frozen.c, by freeze.py).
 *
 * argv[0] says what it shall be: "portmap" the plugin, anything else the command. Its folder, where the other modules
 * are (lib.zip), is that of the loader which has started it. Nothing else of the system is imported from.
 * Source: the manual's "Python Initialization Configuration".
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <malloc.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14; where it is not known, pages come one by one as ever */
#endif
#define COMMAND L"import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); import sys; " \
    L"from cni_portmap.cli.main import main; sys.exit(main())"

extern const struct _frozen frozen_modules[];
PyMODINIT_FUNC PyInit_nftables(void);
PyMODINIT_FUNC PyInit__json(void);
extern char __data_start[], edata[];
static int is_plugin;

/* --- page faults: half of a start is theirs, so the pages that each start writes come in three calls (-14 %) --- */

enum { HEAP = 256 << 10, ARENA = 512 << 10 };

static void populate(char *begin, char *end) {
    begin = (char *)((size_t)begin & ~(size_t)4095);
    madvise(begin, ((size_t)(end - begin) + 4095) & ~(size_t)4095, MADV_POPULATE_WRITE);
}

static void *new_arena(void *context, size_t size) {
    int *arenas = context;
    char *arena = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED) return NULL;
    if (!(*arenas)++) populate(arena, arena + ARENA);
    return arena;
}

static void free_arena(void *context, void *arena, size_t size) {
    (void)context;
    munmap(arena, size);
}

static void prefault(void) {
    static int arenas;
    PyObjectArenaAllocator allocator = {&arenas, new_arena, free_arena};
    PyObject_SetArenaAllocator(&allocator);
    mallopt(M_TOP_PAD, HEAP);
    char *first = malloc(1);
    if (first) populate(first, first + HEAP - 8192);
    free(first);
    populate(__data_start, edata);
}

/* --- start --- */

static void give_up(PyStatus status) {
    const char *what = status.err_msg ? status.err_msg : "unknown";
    if (is_plugin)
        printf("{\"cniVersion\":\"1.1.0\",\"code\":5,\"msg\":\"the interpreter does not start: %s\","
               "\"details\":\"the runtime's limits, or files that are missing, do not let the plugin work\"}\n", what);
    else
        fprintf(stderr, "cni-portmap: the interpreter does not start: %s\n", what);
    fflush(NULL);
    _exit(1);
}

static void need(PyStatus status) {
    if (PyStatus_Exception(status)) give_up(status);
}

/* Let packages that are frozen have their other modules in the zip (FrozenImporter._resolve_filename). */
static void find_the_rest_in(const char *zip) {
    PyObject *root = PyUnicode_DecodeFSDefault(zip), *path = Py_BuildValue("[N]", PyUnicode_FromFormat("%s/encodings", zip));
    PyObject *encodings = PyImport_ImportModule("encodings"); /* it is imported already */
    if (!root || !path || !encodings || PySys_SetObject("_stdlib_dir", root) || PySys_SetObject("frozen", Py_True) ||
        PyObject_SetAttrString(encodings, "__path__", path))
        give_up(PyStatus_NoMemory());
    Py_DECREF(root), Py_DECREF(path), Py_DECREF(encodings);
}

int main(int argc, char **argv) {
    prctl(PR_SET_NAME, "cni-portmap");
    is_plugin = argc > 0 && !strcmp(argv[0], "portmap");
    prefault();

    char folder[4096 + 16];
    ssize_t length = readlink("/proc/self/exe", folder, 4095);
    if (length <= 0) give_up(PyStatus_Error("/proc is not mounted"));
    while (length > 0 && folder[length - 1] != '/') length--;
    strcpy(folder + length, "lib.zip");

    PyPreConfig before;
    PyPreConfig_InitIsolatedConfig(&before);
    before.utf8_mode = 1;
    need(Py_PreInitialize(&before));
    PyImport_FrozenModules = frozen_modules;
    if (PyImport_AppendInittab("nftables", PyInit_nftables) || PyImport_AppendInittab("_json", PyInit__json))
        give_up(PyStatus_NoMemory());

    PyConfig config;
    PyConfig_InitIsolatedConfig(&config);
    config.site_import = 0;
    config.write_bytecode = 0;
    config.parse_argv = 0;
    config.install_signal_handlers = 1; /* or a runtime that has gone would end us by SIGPIPE in the middle */
    config.module_search_paths_set = 1;
    wchar_t *zip = Py_DecodeLocale(folder, NULL);
    folder[length] = 0;
    wchar_t *extensions = Py_DecodeLocale(folder, NULL);
    folder[length] = 'l';
    if (!zip || !extensions) give_up(PyStatus_NoMemory());
    need(PyWideStringList_Append(&config.module_search_paths, zip));
    need(PyWideStringList_Append(&config.module_search_paths, extensions));
    /* All that it would else look for on the system. */
    wchar_t **paths[] = {&config.executable, &config.base_executable, &config.prefix, &config.base_prefix,
                         &config.exec_prefix, &config.base_exec_prefix, &config.program_name};
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) need(PyConfig_SetString(&config, paths[i], zip));
    need(PyConfig_SetBytesArgv(&config, argc, argv));
    if (!is_plugin) need(PyConfig_SetString(&config, &config.run_command, COMMAND));
    if (is_plugin) signal(SIGINT, SIG_IGN); /* Ctrl-C in `podman run` is for the container: what has begun ends well */
    need(Py_InitializeFromConfig(&config));
    PyConfig_Clear(&config);
    find_the_rest_in(folder);
    if (!is_plugin) return Py_RunMain();

    PyGC_Disable(); /* a call ends before it pays */
    PyObject *module = PyImport_ImportModule("cni_portmap.plugin");
    if (module) PyObject_CallMethod(module, "main", NULL); /* it does not return */
    PyErr_Print();
    give_up(PyStatus_Error("files of cni-portmap are missing"));
}
