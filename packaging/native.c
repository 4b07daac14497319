/*
 * The built-in module `nftables` of the bundle: what cni_portmap uses of libnftables and of the C library, without
 * ctypes. The same interface as nftables.py of the package python3-nftables, as far as it goes.
 *
 * libnftables is loaded for the first context, since most calls need none. Sources: libnftables(3), on_exit(3).
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <dlfcn.h>
#include <sched.h>
#include <stdlib.h>
#include <unistd.h>

static void *(*ctx_new)(unsigned);
static void (*ctx_free)(void *);
static int (*buffer_output)(void *), (*buffer_error)(void *), (*run_cmd)(void *, const char *);
static const char *(*get_output)(void *), *(*get_error)(void *);
static void (*dry_run)(void *, char);

typedef struct {
    PyObject_HEAD
    void *context;
} Nftables;

static const struct { const char *name; void *function; } FUNCTIONS[] = {
    {"nft_ctx_new", &ctx_new}, {"nft_ctx_free", &ctx_free}, {"nft_ctx_buffer_output", &buffer_output},
    {"nft_ctx_buffer_error", &buffer_error}, {"nft_ctx_get_output_buffer", &get_output},
    {"nft_ctx_get_error_buffer", &get_error}, {"nft_run_cmd_from_buffer", &run_cmd}, {"nft_ctx_set_dry_run", &dry_run},
};

static int load(void) {
    if (dry_run) return 0;
    char path[4096 + 32]; /* the bundle's own: by its name alone, the host's would do where that is missing */
    ssize_t length = readlink("/proc/self/exe", path, 4095);
    while (length > 0 && path[length - 1] != '/') length--;
    strcpy(path + (length > 0 ? length : 0), "libnftables.so.1");
    void *library = dlopen(path, RTLD_NOW);
    for (size_t i = 0; library && i < sizeof FUNCTIONS / sizeof *FUNCTIONS; i++)
        if (!(*(void **)FUNCTIONS[i].function = dlsym(library, FUNCTIONS[i].name))) library = NULL;
    if (!library) PyErr_SetString(PyExc_OSError, dlerror());
    return library ? 0 : -1;
}

static int init(Nftables *self, PyObject *arguments, PyObject *words) {
    (void)arguments, (void)words;
    if (load()) return -1;
    /* Or libxtables would load the host's extensions. Programs of the host that we start need them: so not for long. */
    setenv("XTABLES_LIBDIR", "/nonexistent", 1);
    self->context = ctx_new(0);
    unsetenv("XTABLES_LIBDIR");
    if (!self->context || buffer_output(self->context) || buffer_error(self->context)) {
        PyErr_NoMemory();
        return -1;
    }
    return 0;
}

static void dealloc(Nftables *self) {
    if (self->context) ctx_free(self->context);
    Py_TYPE(self)->tp_free((PyObject *)self);
}

static PyObject *cmd(Nftables *self, PyObject *text) {
    const char *commands = PyUnicode_AsUTF8(text);
    if (!commands) return NULL;
    int code = run_cmd(self->context, commands);
    const char *output = get_output(self->context), *error = get_error(self->context);
    PyObject *said = PyUnicode_DecodeUTF8(output, (Py_ssize_t)strlen(output), "replace");
    PyObject *refused = PyUnicode_DecodeUTF8(error, (Py_ssize_t)strlen(error), "replace");
    return said && refused ? Py_BuildValue("iNN", code, said, refused) : NULL;
}

static PyObject *set_dry_run(Nftables *self, PyObject *wanted) {
    dry_run(self->context, (char)PyObject_IsTrue(wanted));
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"cmd", (PyCFunction)cmd, METH_O, "Run commands; status, output, error."},
    {"set_dry_run", (PyCFunction)set_dry_run, METH_O, "Whether commands shall change nothing."},
    {NULL, NULL, 0, NULL},
};

static PyTypeObject type = {
    PyVarObject_HEAD_INIT(NULL, 0).tp_name = "nftables.Nftables",
    .tp_basicsize = sizeof(Nftables),
    .tp_flags = Py_TPFLAGS_DEFAULT,
    .tp_new = PyType_GenericNew,
    .tp_init = (initproc)init,
    .tp_dealloc = (destructor)dealloc,
    .tp_methods = methods,
};

static void at_exit(int status, void *call) {
    (void)status;
    PyObject_CallNoArgs(call); /* it does not return */
}

static PyObject *register_exit(PyObject *module, PyObject *call) {
    (void)module;
    Py_INCREF(call);
    on_exit(at_exit, call);
    return Py_NewRef(call);
}

static PyObject *leave_namespaces(PyObject *module, PyObject *flags) {
    (void)module;
    long wanted = PyLong_AsLong(flags);
    if (wanted == -1 && PyErr_Occurred()) return NULL;
    return unshare((int)wanted) ? PyErr_SetFromErrno(PyExc_OSError) : Py_NewRef(Py_None);
}

static PyObject *enter_namespace(PyObject *module, PyObject *arguments) {
    (void)module;
    int fd, flags;
    if (!PyArg_ParseTuple(arguments, "ii", &fd, &flags)) return NULL;
    return setns(fd, flags) ? PyErr_SetFromErrno(PyExc_OSError) : Py_NewRef(Py_None);
}

static PyMethodDef functions[] = {
    {"on_exit", register_exit, METH_O, "Let exit(3) call a function at the end."},
    {"setns", enter_namespace, METH_VARARGS, "Enter a namespace. Raises OSError."},
    {"unshare", leave_namespaces, METH_O, "Leave namespaces for new ones. Raises OSError."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "nftables", .m_size = -1,
                                        .m_methods = functions};

PyMODINIT_FUNC PyInit_nftables(void) {
    PyObject *module = PyModule_Create(&definition);
    if (!module || PyModule_AddType(module, &type)) return NULL;
    return module;
}
