/* What the programs of the kernel tests share. Each program runs one case, named on its command line, and prints what
 * the kernel did as lines `key=value`; the Python test beside it judges. Exit 77: this kernel or user cannot do it, the
 * reason is on standard error. Exit 2: the case itself broke. */
#ifndef FACTS_H
#define FACTS_H
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* Linux 6.6 and 6.7; the headers of Debian 12 are older. */
#ifndef UFFDIO_POISON
struct uffdio_poison {
	struct uffdio_range range;
	__u64 mode;
	__s64 updated;
};
#define UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct uffdio_poison)
#endif
#define FEATURE_POISON (1ULL << 14)
#define FEATURE_WP_ASYNC (1ULL << 15)
/* Of linux/fs.h. */
struct page_region {
	uint64_t start, end, categories;
};
struct pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#define PAGE_IS_WRITTEN (1ULL << 1)
#define PAGE_IS_SWAPPED (1ULL << 4)
#ifndef MFD_HUGETLB
#define MFD_HUGETLB 4U
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

#define PAGE 4096UL
#define HUGE_PAGE (2UL << 20)
#define NEGATIVE_WAIT_MS 300 /* how long "nothing happens" is watched */

#define BROKEN(...) (fprintf(stderr, __VA_ARGS__), fprintf(stderr, " (errno %s)\n", strerrorname_np(errno)), exit(2))
#define LACKING(...) (fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), exit(77))
#define NEED(condition) ((condition) ? (void)0 : BROKEN("%s:%d: %s", __FILE__, __LINE__, #condition))

struct memory {
	char *at;
	size_t page;
	size_t pages;
	int memfd; /* -1: anonymous */
};

static inline const char *name_of(int error) { return error ? strerrorname_np(error) : "0"; }

static inline void say(const char *key, const char *value) { printf("%s=%s\n", key, value); }
static inline void say_number(const char *key, long long value) { printf("%s=%lld\n", key, value); }
static inline void say_hex(const char *key, unsigned long long value) { printf("%s=%#llx\n", key, value); }

static inline struct memory map_memory(const char *backing, size_t pages)
{
	struct memory memory = {.page = PAGE, .pages = pages, .memfd = -1};
	int flags = MAP_PRIVATE | MAP_ANONYMOUS;
	if (!strcmp(backing, "shmem")) {
		memory.memfd = memfd_create("facts", MFD_CLOEXEC);
		NEED(memory.memfd >= 0 && !ftruncate(memory.memfd, pages * PAGE));
		flags = MAP_SHARED;
	} else if (!strcmp(backing, "hugetlb")) {
		memory.page = HUGE_PAGE;
		flags |= MAP_HUGETLB;
	} else if (!strcmp(backing, "hugefile")) {
		memory.page = HUGE_PAGE;
		memory.memfd = memfd_create("facts", MFD_CLOEXEC | MFD_HUGETLB);
		NEED(memory.memfd >= 0 && !ftruncate(memory.memfd, pages * HUGE_PAGE));
		flags = MAP_SHARED;
	} else {
		NEED(!strcmp(backing, "anon"));
	}
	memory.at = mmap(NULL, pages * memory.page, PROT_READ | PROT_WRITE, flags, memory.memfd, 0);
	if (memory.at == MAP_FAILED && memory.page == HUGE_PAGE)
		LACKING("no %zu free huge pages of 2 MiB: echo %zu > /proc/sys/vm/nr_hugepages", pages, pages);
	NEED(memory.at != MAP_FAILED);
	if (memory.page == PAGE)
		madvise(memory.at, pages * PAGE, MADV_NOHUGEPAGE);
	return memory;
}

static inline int open_uffd(int flags, unsigned long long features)
{
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | flags);
	if (uffd < 0)
		LACKING("userfaultfd is refused (%s): it needs root, CAP_SYS_PTRACE or vm.unprivileged_userfaultfd=1",
			strerrorname_np(errno));
	struct uffdio_api api = {.api = UFFD_API, .features = features};
	if (ioctl(uffd, UFFDIO_API, &api))
		LACKING("this kernel's userfaultfd lacks one of the features %#llx", features);
	return uffd;
}

static inline int register_range(int uffd, char *at, size_t size, unsigned long long mode)
{
	struct uffdio_register request = {.range = {(uintptr_t)at, size}, .mode = mode};
	return ioctl(uffd, UFFDIO_REGISTER, &request) ? errno : 0;
}

static inline void register_memory(int uffd, struct memory memory, unsigned long long mode)
{
	NEED(!register_range(uffd, memory.at, memory.pages * memory.page, mode));
}

static inline void unregister_memory(int uffd, struct memory memory)
{
	struct uffdio_range range = {(uintptr_t)memory.at, memory.pages * memory.page};
	NEED(!ioctl(uffd, UFFDIO_UNREGISTER, &range));
}

/* Each returns 0 or the errno, and what the kernel wrote into the request's last field. */
static inline int poison(int uffd, char *at, size_t size, long long *updated)
{
	struct uffdio_poison request = {.range = {(uintptr_t)at, size}};
	int error = ioctl(uffd, UFFDIO_POISON, &request) ? errno : 0;
	if (updated)
		*updated = request.updated;
	return error;
}

static inline int copy_pages(int uffd, char *to, const void *from, size_t size, long long *copied)
{
	struct uffdio_copy request = {.dst = (uintptr_t)to, .src = (uintptr_t)from, .len = size};
	int error = ioctl(uffd, UFFDIO_COPY, &request) ? errno : 0;
	if (copied)
		*copied = request.copy;
	return error;
}

static inline int zero_pages(int uffd, char *at, size_t size)
{
	struct uffdio_zeropage request = {.range = {(uintptr_t)at, size}};
	return ioctl(uffd, UFFDIO_ZEROPAGE, &request) ? errno : 0;
}

static inline int continue_pages(int uffd, char *at, size_t size, long long *mapped)
{
	struct uffdio_continue request = {.range = {(uintptr_t)at, size}};
	int error = ioctl(uffd, UFFDIO_CONTINUE, &request) ? errno : 0;
	if (mapped)
		*mapped = request.mapped;
	return error;
}

/* Ranges of pages of one category; how many there are. */
static inline int scan_pages(int pagemap, struct memory memory, uint64_t flags, uint64_t category, struct page_region *found,
			     size_t room)
{
	struct pm_scan_arg request = {
		.size = sizeof request,
		.flags = flags,
		.start = (uintptr_t)memory.at,
		.end = (uintptr_t)memory.at + memory.pages * PAGE,
		.vec = (uintptr_t)found,
		.vec_len = room,
		.category_mask = category,
		.return_mask = category,
	};
	int count = ioctl(pagemap, PAGEMAP_SCAN, &request);
	NEED(count >= 0);
	return count;
}

static inline int wake(int uffd, char *at, size_t size)
{
	struct uffdio_range range = {(uintptr_t)at, size};
	return ioctl(uffd, UFFDIO_WAKE, &range) ? errno : 0;
}

/* A touch that survives SIGBUS. */
static sigjmp_buf touch_return;
static volatile int touch_code;
static char *volatile touch_address;
static volatile int touch_lsb;

static inline void on_sigbus(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	touch_code = info->si_code;
	touch_address = info->si_addr;
	touch_lsb = info->si_addr_lsb;
	siglongjmp(touch_return, 1);
}

static inline void catch_sigbus(void)
{
	struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_NODEFER};
	NEED(!sigaction(SIGBUS, &action, NULL));
}

/* Returns the byte read, or -1 for SIGBUS. */
static inline int touch(char *at)
{
	if (sigsetjmp(touch_return, 1))
		return -1;
	return (unsigned char)*(volatile char *)at;
}

/* Says under `key` what a touch gives: "byte:N" or "sigbus". Blocks where the kernel waits for a uffd reader. */
static inline void say_touch(const char *key, char *at)
{
	int byte = touch(at);
	if (byte < 0)
		printf("%s=sigbus\n", key);
	else
		printf("%s=byte:%d\n", key, byte);
}

static volatile int hwpoison_signals;

static inline void on_hwpoison(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	hwpoison_signals++;
	touch_code = info->si_code;
	touch_lsb = info->si_addr_lsb;
}

/* Takes the frame out of service until the next boot. The caller, which maps it, gets a SIGBUS from within the call. */
static inline void fail_frame(char *at, size_t size)
{
	struct sigaction action = {.sa_sigaction = on_hwpoison, .sa_flags = SA_SIGINFO};
	NEED(!sigaction(SIGBUS, &action, NULL));
	if (madvise(at, size, MADV_HWPOISON))
		LACKING("MADV_HWPOISON: %s (CONFIG_MEMORY_FAILURE and root are needed)", strerrorname_np(errno));
	catch_sigbus();
}

/* A touch in a thread of its own, for faults that have to wait. */
struct toucher {
	pthread_t thread;
	char *at;
	volatile int tid;
	volatile int byte;
};

static inline void *touch_in_thread(void *argument)
{
	struct toucher *toucher = argument;
	toucher->tid = syscall(SYS_gettid);
	toucher->byte = (unsigned char)*(volatile char *)toucher->at;
	return NULL;
}

static inline void start_toucher(struct toucher *toucher, char *at)
{
	toucher->at = at;
	NEED(!pthread_create(&toucher->thread, NULL, touch_in_thread, toucher));
}

static inline int join_toucher(struct toucher *toucher)
{
	NEED(!pthread_join(toucher->thread, NULL));
	return toucher->byte;
}

/* Whether a uffd event is there within `milliseconds`; -1 waits for ever (the test's own limit ends it). */
static inline int event_waits(int uffd, int milliseconds)
{
	struct pollfd wanted = {.fd = uffd, .events = POLLIN};
	return poll(&wanted, 1, milliseconds) == 1;
}

static inline struct uffd_msg read_event(int uffd)
{
	struct uffd_msg message;
	NEED(event_waits(uffd, -1));
	NEED(read(uffd, &message, sizeof message) == sizeof message);
	return message;
}

static inline char *page_filled_with(int byte)
{
	static char pages[64][PAGE] __attribute__((aligned(4096)));
	memset(pages, byte, sizeof pages);
	return pages[0];
}

struct fact {
	const char *name;
	void (*run)(const char *backing);
};

static inline int run_fact(const struct fact *facts, int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	catch_sigbus();
	for (; facts->name; facts++) {
		if (argc == 3 && !strcmp(facts->name, argv[1])) {
			facts->run(argv[2]);
			return 0;
		}
	}
	fprintf(stderr, "usage: %s CASE anon|shmem|hugetlb|hugefile\n", argv[0]);
	return 2;
}
#endif
