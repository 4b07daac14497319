/*
 * The bundle's portmap and cni-portmap: start the program beside with the bundle's own loader and C library.
 *
 * No C library, so nothing of the host's is needed, and none of the environment's variables for a loader has a say:
 * they are dropped. ROLE is what the program shall be ("portmap": the plugin, "cni-portmap": the command).
 */
#include <stddef.h>

#define MAX_ARGUMENTS 4096
#define MAX_VARIABLES 65536
#define NO_PROC "{\"cniVersion\":\"1.1.0\",\"code\":5,\"msg\":\"cannot find the files of cni-portmap: /proc is not " \
    "mounted\",\"details\":\"mount it: mount -t proc proc /proc\"}\n"
#define NO_PROGRAM "{\"cniVersion\":\"1.1.0\",\"code\":5,\"msg\":\"cannot start: files of cni-portmap are missing, or " \
    "there is not enough memory\",\"details\":\"install it again\"}\n"

#if defined(__x86_64__)
enum { WRITE = 1, EXECVE = 59, EXIT = 60, READLINKAT = 267 };
static long call(long number, long a, long b, long c, long d) {
    register long r10 __asm__("r10") = d;
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
                     : "rcx", "r11", "memory");
    return result;
}
__asm__(".globl _start\n_start: mov %rsp, %rdi\nand $-16, %rsp\ncall begin\n");
#elif defined(__aarch64__)
enum { WRITE = 64, EXECVE = 221, EXIT = 93, READLINKAT = 78 };
static long call(long number, long a, long b, long c, long d) {
    register long x8 __asm__("x8") = number;
    register long x0 __asm__("x0") = a;
    register long x1 __asm__("x1") = b;
    register long x2 __asm__("x2") = c;
    register long x3 __asm__("x3") = d;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3) : "memory");
    return x0;
}
__asm__(".globl _start\n_start: mov x0, sp\nbl begin\n");
#endif

static char folder[4096], loader[4096 + 16], program[4096 + 16];
static char *arguments[MAX_ARGUMENTS + 8], *variables[MAX_VARIABLES + 1];

static char *append(char *to, const char *text) {
    while ((*to = *text++)) to++;
    return to;
}

static int begins(const char *text, const char *with) {
    while (*with) if (*text++ != *with++) return 0;
    return 1;
}

/* The answer that a runtime can read, or a person. */
static void give_up(const char *document, size_t length) {
    call(WRITE, 1, (long)document, (long)length, 0);
    call(EXIT, 1, 0, 0, 0);
}

void begin(long *stack) {
    long count = *stack, used = 0;
    char **argv = (char **)(stack + 1), **environ = argv + count + 1;
    long length = call(READLINKAT, -100, (long)"/proc/self/exe", (long)folder, sizeof folder - 1);
    if (length <= 0 || length >= (long)sizeof folder - 1) give_up(NO_PROC, sizeof NO_PROC - 1);
    while (folder[length] != '/') folder[length--] = 0;
    append(folder + length, "/lib");
    append(append(loader, folder), "/ld.so");
    append(append(program, folder), "/program");

    arguments[used++] = ROLE; /* what ps shows; the loader takes --argv0 for the program's own */
    arguments[used++] = "--inhibit-cache";
    arguments[used++] = "--library-path";
    arguments[used++] = folder;
    arguments[used++] = "--argv0";
    arguments[used++] = ROLE;
    arguments[used++] = program;
    for (long i = 1; i < count && i < MAX_ARGUMENTS; i++) arguments[used++] = argv[i];
    used = 0;
    for (long i = 0; environ[i] && used < MAX_VARIABLES; i++)
        if (!begins(environ[i], "LD_") && !begins(environ[i], "GLIBC_") && !begins(environ[i], "XTABLES_LIBDIR="))
            variables[used++] = environ[i];
    call(EXECVE, (long)loader, (long)arguments, (long)variables, 0);
    give_up(NO_PROGRAM, sizeof NO_PROGRAM - 1);
}
