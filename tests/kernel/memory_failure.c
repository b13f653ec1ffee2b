/* What a kernel with CONFIG_MEMORY_FAILURE does with frames that went bad. Each case takes frames out of service until the
 * next boot. Page 1 of the memory goes bad; of a huge page a piece of 4 KiB in its midst. */
#include "facts.h"
#include <netinet/in.h>
#include <sys/prctl.h>
#include <sys/sendfile.h>
#include <sys/stat.h>

#ifndef MADV_SOFT_OFFLINE
#define MADV_SOFT_OFFLINE 101
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#define PFN ((1ULL << 55) - 1)
#define SOFT_DIRTY (1ULL << 55)
#define KPF_THP 22
#define KPF_HWPOISON 19
#define PAGES 4
#define FEW (5 * PAGE) /* from a huge page's start to its bad piece */

static struct memory memory;
static char *bad;

static uint64_t word_of(const char *file, uint64_t number)
{
	uint64_t word;
	int fd = open(file, O_RDONLY);
	NEED(fd >= 0 && pread(fd, &word, sizeof word, number * sizeof word) == sizeof word && !close(fd));
	return word;
}

static uint64_t entry_of(const char *at) { return word_of("/proc/self/pagemap", (uintptr_t)at / PAGE) & ~SOFT_DIRTY; }
static int kpageflag(uint64_t pfn, int flag) { return word_of("/proc/kpageflags", pfn) >> flag & 1; }
static const char *code_name(int code) { return code == BUS_MCEERR_AR ? "AR" : code == BUS_MCEERR_AO ? "AO" : "other"; }

/* Every 4 KiB of page n begins with byte n + 1. */
static void fill(const char *backing)
{
	memory = map_memory(backing, PAGES);
	for (size_t at = 0; at < PAGES * memory.page; at += PAGE)
		memory.at[at] = at / memory.page + 1;
	bad = memory.at + memory.page + (memory.page == PAGE ? 0 : FEW);
}

static char *map_again(void)
{
	char *at = mmap(NULL, PAGES * memory.page, PROT_READ, MAP_SHARED, memory.memfd, 0);
	NEED(at != MAP_FAILED);
	return at;
}

/* The host finds the frame bad, as hardware does; 0 or the errno (Documentation/mm/hwpoison.rst). */
static int corrupt(const char *at)
{
	char number[32];
	int file = open("/sys/kernel/debug/hwpoison/corrupt-pfn", O_WRONLY);
	if (file < 0)
		LACKING("corrupt-pfn: %s (modprobe hwpoison_inject)", strerrorname_np(errno));
	int length = snprintf(number, sizeof number, "%#llx", (unsigned long long)(entry_of(at) & PFN));
	int error = write(file, number, length) < 0 ? errno : 0;
	close(file);
	return error;
}

static void touched(const char *backing)
{
	fill(backing);
	int shared = memory.memfd >= 0;
	char *other = shared ? map_again() : NULL, *late = shared ? map_again() : NULL;
	if (shared)
		(void)*(volatile char *)(other + (bad - memory.at));
	fail_frame(bad, PAGE);
	say_number("caller_signals", hwpoison_signals);
	say("caller_code", code_name(touch_code));
	say_number("caller_lsb", touch_lsb);
	touch_code = touch_lsb = 0;
	say_touch("touch", bad + 100);
	say("code", code_name(touch_code));
	say_number("lsb", touch_lsb);
	say_number("offset", touch_address - bad);
	say_touch("next_page", memory.at + 2 * memory.page);
	if (memory.page > PAGE)
		say_touch("same_huge_page", memory.at + memory.page);
	if (shared) {
		say_touch("other_mapping", other + (bad - memory.at));
		say_touch("untouched_mapping", late + (bad - memory.at));
	}
}

static void say_read(const char *key, ssize_t count)
{
	if (count < 0)
		say(key, name_of(errno));
	else
		say_number(key, count);
}

static void system_calls(const char *backing)
{
	static char buffer[2 * PAGE];
	struct iovec here = {buffer, PAGE}, there;
	int pipe_ends[2], sockets[2], mem = open("/proc/self/mem", O_RDWR);
	fill(backing);
	fail_frame(bad, PAGE);
	there = (struct iovec){bad, PAGE};
	NEED(mem >= 0 && !pipe(pipe_ends) && !socketpair(AF_UNIX, SOCK_STREAM, 0, sockets));
	say_read("process_vm_readv", process_vm_readv(getpid(), &here, 1, &there, 1, 0));
	say_read("write", write(pipe_ends[1], bad, PAGE));
	say_read("send", send(sockets[0], bad, PAGE, 0));
	say_read("proc_mem", pread(mem, buffer, PAGE, (uintptr_t)bad));
	say_read("populate", madvise(bad, PAGE, MADV_POPULATE_READ));
	if (memory.memfd < 0)
		return;
	off_t at = bad - memory.at, from = at;
	say_read("pread", pread(memory.memfd, buffer, PAGE, at));
	say_read("pwrite", pwrite(memory.memfd, buffer, PAGE, at));
	say_read("sendfile", sendfile(sockets[0], memory.memfd, &from, PAGE));
	say_read("pread_from_before", pread(memory.memfd, buffer, 2 * PAGE, at - PAGE));
	unsigned char resident = 9;
	NEED(!mincore(bad, PAGE, &resident));
	say_number("mincore", resident);
	say_number("seek_data", lseek(memory.memfd, at, SEEK_DATA) - at);
}

/* 511 of the 512 pieces of a huge page in a memfd can be read from the file, and none through a mapping. */
static void pieces_of_a_huge_page(const char *backing)
{
	static char buffer[HUGE_PAGE];
	fill(backing);
	fail_frame(bad, PAGE);
	int good = 0;
	for (off_t at = HUGE_PAGE; at < 2 * (off_t)HUGE_PAGE; at += PAGE)
		good += pread(memory.memfd, buffer, PAGE, at) == PAGE && buffer[0] == 2;
	say_number("good_pieces", good);
	say_read("bad_piece", pread(memory.memfd, buffer, PAGE, bad - memory.at));
	say_read("whole", pread(memory.memfd, buffer, HUGE_PAGE, HUGE_PAGE));
}

static void in_pagemap(const char *backing)
{
	fill(backing);
	uint64_t pfn = entry_of(bad) & PFN;
	NEED(pfn);
	fail_frame(bad, PAGE);
	uint64_t entry = entry_of(bad);
	say_number("swapped", entry >> 62 == 1);
	say_number("has_pfn", (entry & PFN) >> 5 == pfn);
	say_number("marker_type", (entry & 31) == 31);
	say_number("kpageflag", kpageflag(pfn, KPF_HWPOISON));
	struct page_region found[PAGES];
	struct memory whole = memory;
	whole.pages = PAGES * (memory.page / PAGE);
	int count = scan_pages(open("/proc/self/pagemap", O_RDONLY), whole, 0, PAGE_IS_SWAPPED, found, PAGES);
	say_number("ranges", count);
	say_number("first", count ? (long long)((found[0].start - (uintptr_t)memory.at) / PAGE) : -1);
	say_number("pages", count ? (long long)((found[0].end - found[0].start) / PAGE) : 0);
}

static int uffd_over(const char *backing)
{
	fill(backing);
	int huge = memory.page > PAGE, shared = memory.memfd >= 0;
	unsigned long long minor = huge ? UFFD_FEATURE_MINOR_HUGETLBFS : UFFD_FEATURE_MINOR_SHMEM;
	int uffd = open_uffd(0, FEATURE_POISON | (shared ? minor : 0));
	register_memory(uffd, memory, UFFDIO_REGISTER_MODE_MISSING | (shared ? UFFDIO_REGISTER_MODE_MINOR : 0));
	fail_frame(bad, PAGE);
	return uffd;
}

static void say_copy(const char *key, int uffd)
{
	static char content[HUGE_PAGE];
	say(key, name_of(copy_pages(uffd, memory.at + memory.page, content, memory.page, NULL)));
}

static void uffd_calls(const char *backing)
{
	int uffd = uffd_over(backing);
	char *page = memory.at + memory.page;
	say_copy("copy", uffd);
	say("poison", name_of(poison(uffd, page, memory.page, NULL)));
	if (memory.memfd >= 0)
		say("continue", name_of(continue_pages(uffd, page, memory.page, NULL)));
	if (memory.page == PAGE)
		say("zeropage", name_of(zero_pages(uffd, page, PAGE)));
	say_touch("touch", bad);
}

/* The frame is in the file, and this mapping has no entry for it: as of a page that came and is not mapped yet. */
static void unmapped_in_the_file(const char *backing)
{
	int uffd = uffd_over(backing);
	struct toucher toucher;
	NEED(!madvise(bad, PAGE, MADV_DONTNEED));
	say("continue", name_of(continue_pages(uffd, bad, PAGE, NULL)));
	start_toucher(&toucher, bad);
	struct uffd_msg event = read_event(uffd);
	say_number("minor", !!(event.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR));
	say("continue_then", name_of(continue_pages(uffd, bad, PAGE, NULL)));
	say_copy("copy", uffd);
	NEED(!fallocate(memory.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, bad - memory.at, PAGE));
	say("copy_after_punch", name_of(copy_pages(uffd, bad, page_filled_with(9), PAGE, NULL)));
	say_number("byte", join_toucher(&toucher));
}

static void marker_over_it(const char *backing)
{
	int uffd = uffd_over(backing);
	NEED(!madvise(bad, PAGE, MADV_DONTNEED));
	say("poison", name_of(poison(uffd, bad, PAGE, NULL)));
	say_copy("copy", uffd);
	say("continue", name_of(continue_pages(uffd, bad, PAGE, NULL)));
	say_touch("touch", bad);
}

static void given_back(const char *backing)
{
	fill(backing);
	char *other = memory.memfd < 0 ? NULL : map_again() + (bad - memory.at);
	if (other)
		(void)*(volatile char *)other;
	fail_frame(bad, PAGE);
	NEED(!madvise(memory.at + memory.page, memory.page, MADV_DONTNEED));
	say_touch("after_dontneed", bad);
	if (memory.memfd < 0)
		return;
	NEED(!fallocate(memory.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, memory.page, memory.page));
	say_touch("after_punch_hole", bad);
	/* Of another mapping, which had the page and was not told to drop it. */
	say_touch("other_mapping", other);
	char byte = 9;
	NEED(pread(memory.memfd, &byte, 1, bad - memory.at) == 1);
	say_number("pread", byte);
}

/* A page on its way into guest memory, whose frame goes bad meanwhile. */
static void copied_from_it(const char *backing)
{
	memory = map_memory(backing, PAGES);
	int uffd = open_uffd(0, memory.page == PAGE ? 0 : UFFD_FEATURE_MISSING_HUGETLBFS);
	register_memory(uffd, memory, UFFDIO_REGISTER_MODE_MISSING);
	int private = MAP_PRIVATE | MAP_ANONYMOUS;
	char *to = memory.at + memory.page, *from = mmap(NULL, memory.page, PROT_READ | PROT_WRITE, private, -1, 0);
	NEED(from != MAP_FAILED);
	madvise(from, memory.page, MADV_NOHUGEPAGE);
	memset(from, 6, memory.page);
	char *its_bad = from + (memory.page == PAGE ? 0 : FEW);
	fail_frame(its_bad, PAGE);
	int signals = hwpoison_signals;
	say("copy", name_of(copy_pages(uffd, to, from, memory.page, NULL)));
	say_number("signals", hwpoison_signals - signals);
	NEED(!madvise(its_bad, PAGE, MADV_DONTNEED));
	memset(its_bad, 6, PAGE);
	say("copy_then", name_of(copy_pages(uffd, to, from, memory.page, NULL)));
	say_touch("byte", to + (its_bad - from));
}

/* Nothing that a call could not store is taken from the connection. */
static void received_into_it(const char *backing)
{
	static char rest[3 * PAGE];
	fill(backing);
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
	socklen_t size = sizeof address;
	int listener = socket(AF_INET, SOCK_STREAM, 0), sender = socket(AF_INET, SOCK_STREAM, 0);
	NEED(!bind(listener, (struct sockaddr *)&address, size) && !listen(listener, 1));
	NEED(!getsockname(listener, (struct sockaddr *)&address, &size) && !connect(sender, (struct sockaddr *)&address, size));
	int receiver = accept(listener, NULL, NULL);
	fail_frame(bad, PAGE);
	memset(rest, 8, 2 * PAGE);
	NEED(write(sender, rest, 2 * PAGE) == 2 * PAGE);
	memset(rest, 0, sizeof rest);
	NEED(recv(receiver, rest, 2 * PAGE, MSG_PEEK | MSG_WAITALL) > 0);
	say_read("recv", recv(receiver, bad, PAGE, 0));
	NEED(!shutdown(sender, SHUT_WR));
	ssize_t got = recv(receiver, rest, sizeof rest, MSG_WAITALL);
	say_read("recv_then", got);
	say_number("byte", rest[0]);
}

/* The host finds a frame bad that a system call holds: it cannot set the frame aside, which is bad all the same. */
static void in_use(const char *backing)
{
	fill(backing);
	int pipe_ends[2];
	struct iovec held = {bad, PAGE};
	NEED(!pipe(pipe_ends) && vmsplice(pipe_ends[1], &held, 1, 0) == PAGE);
	say("corrupt", name_of(corrupt(bad)));
	say_touch("touch", bad);
}

static void in_transparent_huge_page(const char *backing)
{
	int fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
	char *at = mmap(NULL, 2 * HUGE_PAGE, PROT_NONE, flags, -1, 0);
	NEED(at != MAP_FAILED);
	if (!strcmp(backing, "shmem")) {
		fd = memfd_create("thp", MFD_CLOEXEC), flags = MAP_SHARED;
		NEED(fd >= 0 && !ftruncate(fd, HUGE_PAGE));
	}
	/* Address and offset in the file are aligned alike: no huge page is mapped otherwise. */
	char *huge = (char *)(((uintptr_t)at + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
	NEED(mmap(huge, HUGE_PAGE, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, 0) == huge);
	madvise(huge, HUGE_PAGE, MADV_HUGEPAGE);
	memset(huge, 4, HUGE_PAGE);
	if (!kpageflag(entry_of(huge) & PFN, KPF_THP) && madvise(huge, HUGE_PAGE, MADV_COLLAPSE))
		LACKING("no transparent huge page: %s", strerrorname_np(errno));
	NEED(kpageflag(entry_of(huge) & PFN, KPF_THP));
	fail_frame(huge + FEW, PAGE);
	say_number("caller_signals", hwpoison_signals);
	say_touch("bad", huge + FEW);
	int good = 0;
	for (size_t n = 0; n < HUGE_PAGE / PAGE; n++)
		good += touch(huge + n * PAGE) == 4;
	say_number("good_pages", good);
}

static void soft_offlined(const char *backing)
{
	fill(backing);
	int uffd = open_uffd(0, 0);
	register_memory(uffd, memory, UFFDIO_REGISTER_MODE_MISSING);
	uint64_t before = entry_of(bad) & PFN;
	if (madvise(bad, PAGE, MADV_SOFT_OFFLINE))
		LACKING("MADV_SOFT_OFFLINE: %s", strerrorname_np(errno));
	say_touch("touch", bad);
	say_number("event", event_waits(uffd, 0));
	say_number("other_frame", (entry_of(bad) & PFN) != before);
}

static volatile int early_signals, early_code, early_lsb, early_in_main;

static void on_early(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	early_signals++, early_code = info->si_code, early_lsb = info->si_addr_lsb;
	early_in_main = gettid() == getpid();
}

static void *wait_for_ever(void *argument)
{
	for (;;)
		pause();
	return argument;
}

static void set_policy(int policy) { NEED(!prctl(PR_MCE_KILL, PR_MCE_KILL_SET, policy, 0, 0)); }

/* The host finds the frame, and no thread touches it. */
static void untouched(const char *backing)
{
	fill(backing);
	struct sigaction action = {.sa_sigaction = on_early, .sa_flags = SA_SIGINFO};
	NEED(!sigaction(SIGBUS, &action, NULL));
	NEED(!corrupt(bad));
	usleep(NEGATIVE_WAIT_MS * 1000);
	say_number("signals", early_signals);
	if (early_signals) {
		say("code", code_name(early_code));
		say_number("lsb", early_lsb);
		say_number("in_main_thread", early_in_main);
	}
}

static void untouched_with_a_policy(int policy, int thread_first, const char *backing)
{
	pthread_t thread;
	if (thread_first)
		NEED(!pthread_create(&thread, NULL, wait_for_ever, NULL));
	set_policy(policy);
	if (!thread_first)
		NEED(!pthread_create(&thread, NULL, wait_for_ever, NULL));
	untouched(backing);
}

static void untouched_early(const char *backing) { untouched_with_a_policy(PR_MCE_KILL_EARLY, 0, backing); }
static void untouched_late(const char *backing) { untouched_with_a_policy(PR_MCE_KILL_LATE, 0, backing); }
static void untouched_late_too_late(const char *backing) { untouched_with_a_policy(PR_MCE_KILL_LATE, 1, backing); }

static void *say_policy(void *key)
{
	say_number(key, prctl(PR_MCE_KILL_GET, 0, 0, 0, 0));
	return NULL;
}

/* PR_MCE_KILL_LATE is 0, EARLY 1, DEFAULT 2. */
static void policy_goes_on(const char *backing)
{
	pthread_t thread;
	say_policy("at_first");
	set_policy(PR_MCE_KILL_LATE);
	NEED(!pthread_create(&thread, NULL, say_policy, "thread") && !pthread_join(thread, NULL));
	fflush(stdout);
	if (!fork()) {
		say_policy("child");
		fflush(stdout);
		execl("/proc/self/exe", "memory_failure", "policy-here", backing, NULL);
	}
	NEED(wait(NULL) > 0);
}

static void policy_here(const char *backing)
{
	(void)backing;
	say_policy("exec");
}

int main(int argc, char **argv)
{
	static const struct fact facts[] = {
		{"touched", touched},
		{"system-calls", system_calls},
		{"pieces-of-a-huge-page", pieces_of_a_huge_page},
		{"in-pagemap", in_pagemap},
		{"uffd-calls", uffd_calls},
		{"unmapped-in-the-file", unmapped_in_the_file},
		{"marker-over-it", marker_over_it},
		{"given-back", given_back},
		{"copied-from-it", copied_from_it},
		{"received-into-it", received_into_it},
		{"in-use", in_use},
		{"in-transparent-huge-page", in_transparent_huge_page},
		{"soft-offlined", soft_offlined},
		{"untouched", untouched},
		{"untouched-early", untouched_early},
		{"untouched-late", untouched_late},
		{"untouched-late-too-late", untouched_late_too_late},
		{"policy-goes-on", policy_goes_on},
		{"policy-here", policy_here},
		{NULL, NULL},
	};
	return run_fact(facts, argc, argv);
}
