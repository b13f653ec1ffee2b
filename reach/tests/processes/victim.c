// A process that another steps into. `victim MODE [ARGUMENT...]` says "ready" on a line of its own, does what the mode names
// once, and then says what it noticed: "ok MILLISECONDS", or what went wrong.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <linux/rseq.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now_ms(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

static void ready(void) {
  puts("ready");
  fflush(stdout);
}

// Ends the process: with what a call returned, against what it must return.
static int done(double began, long result, long expected) {
  int error = errno;
  if (result == expected)
    printf("ok %.0f\n", now_ms() - began);
  else
    printf("returned %ld, errno %d (%s)\n", result, error, strerror(error));
  fflush(stdout);
  return result != expected;
}

// One blocking call; `ms` limits it where the call has a limit. Standard input ends the others.
static int asleep(const char *call, int ms) {
  struct pollfd input = {0, POLLIN, 0};
  struct timespec limit = {ms / 1000, ms % 1000 * 1000000L};
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGUSR2);
  char byte;
  int futex = 0, epoll = epoll_create1(0), pair[2];
  struct epoll_event event = {.events = EPOLLIN}, got;
  epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
  ready();
  double began = now_ms();
  if (!strcmp(call, "poll")) return done(began, poll(0, 0, ms), 0);
  if (!strcmp(call, "ppoll")) return done(began, ppoll(&input, 1, 0, &set), 1);
  if (!strcmp(call, "ppoll-limit")) return done(began, ppoll(0, 0, &limit, &set), 0);
  if (!strcmp(call, "read")) return done(began, read(0, &byte, 1), 1);
  if (!strcmp(call, "nanosleep")) return done(began, nanosleep(&limit, 0), 0);
  if (!strcmp(call, "futex")) {
    long result = syscall(SYS_futex, &futex, FUTEX_WAIT_PRIVATE, 0, &limit, 0, 0);
    return done(began, result == -1 ? errno : result, ETIMEDOUT);
  }
  if (!strcmp(call, "epoll")) return done(began, epoll_wait(epoll, &got, 1, -1), 1);
  if (!strcmp(call, "epoll-pwait")) return done(began, epoll_pwait(epoll, &got, 1, -1, &set), 1);
  if (!strcmp(call, "epoll-limit")) {
    epoll_ctl(epoll, EPOLL_CTL_DEL, 0, &event);
    return done(began, epoll_wait(epoll, &got, 1, ms), 0);
  }
  if (!strcmp(call, "sigtimedwait")) {
    sigprocmask(SIG_BLOCK, &set, 0);
    long result = sigtimedwait(&set, 0, &limit);
    return done(began, result == -1 ? errno : result, EAGAIN);
  }
  if (!strcmp(call, "recv-limit")) {
    socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
    struct timeval timeout = {ms / 1000, ms % 1000 * 1000};
    setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
    long result = recv(pair[0], &byte, 1, 0);
    return done(began, result == -1 ? errno : result, EAGAIN);
  }
  return 2;
}

// Arithmetic in registers whose result is known; any register that changes shows.
static int spin(int ms) {
  ready();
  double began = now_ms();
  while (now_ms() - began < ms)
    for (int round = 0; round < 100; round++) {
      uint64_t a = 1, b = 2, c = 3, d = 4;
      double x = 1.0;
      for (int i = 0; i < 1000; i++) {
        a = a * 6364136223846793005u + b, b ^= a >> 7, c += b ^ i, d = (d << 1 | d >> 63) + c;
        x = x * 1.0000001 + 0.5;
      }
      static uint64_t sum;
      static double last;
      uint64_t is = a ^ b ^ c ^ d;
      if (sum && (sum != is || last != x)) return printf("a register changed\n"), 1;
      sum = is, last = x;
    }
  return done(began, 0, 0);
}

// Runs in a restartable sequence nearly all the time. The kernel forgets the sequence of a thread that it finds elsewhere: one
// that goes on inside all the same finds no sequence at the end.
static int sequence(int ms) {
  struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
  if (!__rseq_size) return printf("no rseq\n"), 1;
  ready();
  double began = now_ms();
  while (now_ms() - began < ms) {
    unsigned long aborted = 0, count = 200000, at_end = 1;
    __asm__ volatile(
        ".pushsection __rseq_cs, \"aw\"\n\t.balign 32\n1:\n\t.long 0, 0\n\t.quad 2f, 3f - 2f, 4f\n\t.popsection\n\t"
        "leaq 1b(%%rip), %%rax\n\tmovq %%rax, %[cs]\n"
        "2:\n\tdecq %[count]\n\tjnz 2b\n\tmovq %[cs], %[at_end]\n"
        "3:\n\tjmp 5f\n\t.byte 0x0f, 0xb9, 0x3d\n\t.long 0x53053053\n"
        "4:\n\tmovq $1, %[aborted]\n"
        "5:\n"
        : [cs] "+m"(area->rseq_cs), [count] "+r"(count), [aborted] "+r"(aborted), [at_end] "+r"(at_end)
        :
        : "rax", "cc", "memory");
    if (!aborted && !at_end) return printf("went on in the middle of a sequence\n"), 1;
  }
  return done(began, 0, 0);
}

// A seccomp filter: answers the system calls in `rest` (numbers) with `action`, and allows the others; or the reverse.
static int filter(const char *action, int deny, char **rest) {
  uint32_t answer = !strcmp(action, "kill") ? SECCOMP_RET_KILL_PROCESS
                    : !strcmp(action, "trap") ? SECCOMP_RET_TRAP
                                              : SECCOMP_RET_ERRNO | EPERM;
  struct sock_filter filter[64];
  int at = 0;
  filter[at++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
  for (; *rest; rest++) {
    filter[at++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, atoi(*rest), 0, 1);
    filter[at++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, deny ? answer : SECCOMP_RET_ALLOW);
  }
  filter[at++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, deny ? SECCOMP_RET_ALLOW : answer);
  struct sock_fprog program = {at, filter};
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) return printf("no filter: %s\n", strerror(errno)), 1;
  return 0;
}
static void on_sigsys(int signal) {
  (void)!write(1, "SIGSYS\n", 7);
  (void)signal;
}
static int filtered(const char *action, int deny, char **rest) {
  struct sigaction handler = {.sa_handler = on_sigsys}, after;
  sigaction(SIGSYS, &handler, 0);
  if (filter(action, deny, rest)) return 1;
  ready();
  char byte;
  long result = read(0, &byte, 1);
  sigaction(SIGSYS, 0, &after);
  if (after.sa_handler != on_sigsys) (void)!write(1, "handler lost\n", 13);
  (void)!write(1, result == 1 ? "ok 0\n" : "disturbed\n", result == 1 ? 5 : 10);
  _exit(0);
}

// Real-time signals are queued: none may be lost or come twice, while threads sleep that must not see EINTR.
static atomic_int sum, received;
static void count(int signal, siginfo_t *info, void *context) {
  (void)signal, (void)context;
  sum += info->si_value.sival_int;
  received++;
}
static void *polls(void *failed) {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, 0);
  int epoll = epoll_create1(0);
  struct epoll_event got;
  for (int i = 0;; i++)
    if (i % 2 ? poll(0, 0, 3) : epoll_wait(epoll, &got, 1, 3)) *(atomic_int *)failed = errno;
  return 0;
}
static int signals(int amount) {
  struct sigaction action = {.sa_sigaction = count, .sa_flags = SA_SIGINFO | SA_RESTART};
  sigaction(SIGRTMIN, &action, 0);
  static atomic_int failed;
  pthread_t threads[3];
  for (int i = 0; i < 3; i++) pthread_create(&threads[i], 0, polls, &failed);
  ready();
  pid_t self = getpid(), child = fork();
  if (!child) {
    for (int i = 1; i <= amount; i++) {
      while (sigqueue(self, SIGRTMIN, (union sigval){.sival_int = i})) usleep(100);
      usleep(i % 7 * 50);
    }
    _exit(0);
  }
  char byte;
  long got = read(0, &byte, 1);
  int error = errno;
  waitpid(child, 0, 0);
  if (got != 1) return printf("read returned %ld, errno %d\n", got, error), 1;
  if (failed) return printf("a thread without signals saw errno %d\n", failed), 1;
  if (received != amount || sum != amount * (amount + 1) / 2) return printf("%d signals of %d, sum %d\n", received, amount, sum), 1;
  printf("ok 0\n");
  return 0;
}

// Threads that end all the time, but for the one that reads.
static void *brief(void *nothing) {
  usleep(rand() % 300);
  return nothing;
}
static void *spawn(void *nothing) {
  for (;;) {
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) pthread_create(&threads[i], 0, brief, 0);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], 0);
  }
  return nothing;
}
static int exits(void) {
  pthread_t thread;
  pthread_create(&thread, 0, spawn, 0);
  ready();
  char byte;
  double began = now_ms();
  return done(began, read(0, &byte, 1), 1);
}

// Memory of a kind; writes where asked. Says "memory ADDRESS SIZE" before "ready".
static int memory(const char *kind, size_t size, char **rest) {
  int memfd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
  if (strstr(kind, "memfd")) {
    memfd = memfd_create("ram", strstr(kind, "huge") ? MFD_HUGETLB : 0);
    if (memfd < 0 || ftruncate(memfd, size)) return printf("no memfd: %s\n", strerror(errno)), 1;
    flags = strstr(kind, "private") ? MAP_PRIVATE : MAP_SHARED;
  } else if (strstr(kind, "file:")) {
    memfd = open(strstr(kind, "file:") + 5, O_RDWR | O_CREAT, 0600);
    if (memfd < 0 || ftruncate(memfd, size)) return printf("no file: %s\n", strerror(errno)), 1;
    flags = MAP_SHARED;
  } else if (!strcmp(kind, "shared"))
    flags = MAP_SHARED | MAP_ANONYMOUS;
  char *base = mmap(0, size, PROT_READ | PROT_WRITE, flags, memfd, 0);
  if (base == MAP_FAILED) return printf("no memory: %s\n", strerror(errno)), 1;
  for (; *rest; rest++) {
    if (!strcmp(*rest, "lock")) mlock2(base, size, MLOCK_ONFAULT);
    else if (!strcmp(*rest, "close")) close(memfd);
    else if (!strncmp(*rest, "allocate:", 9)) (void)!fallocate(memfd, 0, atol(*rest + 9), 4096);
    else if (!strncmp(*rest, "look:", 5)) (void)*(volatile char *)(base + atol(*rest + 5));
    else base[atol(*rest)] = 'x';
  }
  printf("memory %lu %zu\n", (unsigned long)base, size);
  ready();
  // A line "read OFFSET" or "device" is answered; the end of the input ends the process.
  char line[64];
  while (fgets(line, sizeof line, stdin)) {
    if (!strncmp(line, "read ", 5)) printf("byte %d\n", base[atol(line + 5)]);
    else if (!strcmp(line, "device\n")) printf("device %d\n", open("/dev/userfaultfd", O_RDWR | O_CLOEXEC));
    fflush(stdout);
  }
  return done(now_ms(), 0, 0);
}

// Asleep in read, with a thread that the kernel made: it polls a queue of io_uring for a minute.
static int worker(void) {
  struct io_uring_params ring = {.flags = IORING_SETUP_SQPOLL, .sq_thread_idle = 60000};
  if (syscall(SYS_io_uring_setup, 1, &ring) < 0) return puts("none"), 1;
  return asleep("read", 0);
}

int main(int arguments, char **values) {
  // No memory is allocated behind a filter.
  static char buffer[4096];
  setvbuf(stdout, buffer, _IOFBF, sizeof buffer);
  if (arguments < 2) return 2;
  // "filtered ACTION NUMBER MODE...": another mode, with a filter that denies one call; "run PROGRAM...": another program.
  static char *none[2];
  if (arguments > 4 && !strcmp(values[1], "filtered")) {
    none[0] = values[3];
    if (filter(values[2], 1, none)) return 1;
    values += 3, arguments -= 3;
  }
  if (arguments > 2 && !strcmp(values[1], "run")) {
    static char reboot[] = "169";
    none[0] = reboot;
    return filter("errno", 1, none) || execvp(values[2], values + 2);
  }
  const char *mode = values[1];
  int number = arguments > 2 ? atoi(values[2]) : 0;
  if (!strcmp(mode, "asleep")) return asleep(values[2], atoi(values[3]));
  if (!strcmp(mode, "spin")) return spin(number);
  if (!strcmp(mode, "sequence")) return sequence(number);
  if (!strcmp(mode, "allow")) return filtered(values[2], 0, values + 3);
  if (!strcmp(mode, "deny")) return filtered(values[2], 1, values + 3);
  if (!strcmp(mode, "strict")) {
    ready();
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT)) return 1;
    char byte;
    long result = read(0, &byte, 1);
    (void)!write(1, result == 1 ? "ok 0\n" : "disturbed\n", result == 1 ? 5 : 10);
    syscall(SYS_exit, 0);
  }
  if (!strcmp(mode, "signals")) return signals(number);
  if (!strcmp(mode, "exits")) return exits();
  if (!strcmp(mode, "worker")) return worker();
  if (!strcmp(mode, "memory")) return memory(values[2], atol(values[3]), values + 4);
  return 2;
}
