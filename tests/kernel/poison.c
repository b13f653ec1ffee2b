/* What UFFDIO_POISON does, and what undoes it. */
#include <linux/capability.h>
#include "facts.h"

#define MISSING UFFDIO_REGISTER_MODE_MISSING
#define MINOR UFFDIO_REGISTER_MODE_MINOR

static int uffd;

static struct memory registered(const char *backing, unsigned long long mode)
{
	unsigned long long features = FEATURE_POISON;
	if (mode & MINOR)
		features |= UFFD_FEATURE_MINOR_SHMEM;
	uffd = open_uffd(0, features);
	struct memory memory = map_memory(backing, !strcmp(backing, "hugetlb") ? 2 : 8);
	register_memory(uffd, memory, mode);
	return memory;
}

/* Page 1 of fresh memory carries a marker. */
static struct memory marked(const char *backing, unsigned long long mode)
{
	struct memory memory = registered(backing, mode);
	NEED(!poison(uffd, memory.at + memory.page, memory.page, NULL));
	return memory;
}

static void say_signal(struct memory memory)
{
	say_number("offset", touch_address - memory.at);
	say("code", touch_code == BUS_MCEERR_AR ? "BUS_MCEERR_AR" : touch_code == BUS_ADRERR ? "BUS_ADRERR" : "other");
	say_number("lsb", touch_lsb);
}

static void absent(const char *backing)
{
	struct memory memory = registered(backing, MISSING);
	long long updated;
	say("poison", name_of(poison(uffd, memory.at + memory.page, memory.page, &updated)));
	say_number("updated", updated);
	say_touch("touch", memory.at + memory.page + 8);
	say_signal(memory);
	say_number("event", event_waits(uffd, 0));
}

static void in_page_cache(const char *backing)
{
	struct memory memory = registered(backing, MISSING | MINOR);
	NEED(pwrite(memory.memfd, "x", 1, memory.page) == 1);
	say("poison", name_of(poison(uffd, memory.at + memory.page, memory.page, NULL)));
	say_touch("touch", memory.at + memory.page);
	say_number("event", event_waits(uffd, 0));
}

static void present(const char *backing)
{
	struct memory memory = registered(backing, MISSING);
	NEED(!copy_pages(uffd, memory.at, page_filled_with(7), PAGE, NULL));
	long long updated;
	say("poison", name_of(poison(uffd, memory.at, PAGE, &updated)));
	say_number("updated", updated);
	say_touch("touch", memory.at);
}

static void twice(const char *backing)
{
	struct memory memory = marked(backing, MISSING);
	long long updated;
	say("poison", name_of(poison(uffd, memory.at + memory.page, memory.page, &updated)));
	say_number("updated", updated);
	say_touch("touch", memory.at + memory.page);
}

static void range_partly_present(const char *backing)
{
	struct memory memory = registered(backing, MISSING);
	NEED(!copy_pages(uffd, memory.at + 2 * PAGE, page_filled_with(7), PAGE, NULL));
	long long updated;
	say("poison", name_of(poison(uffd, memory.at, 4 * PAGE, &updated)));
	say_number("updated", updated);
	say("again", name_of(poison(uffd, memory.at + updated + PAGE, PAGE, NULL)));
	say_touch("page0", memory.at);
	say_touch("page1", memory.at + PAGE);
	say_touch("page2", memory.at + 2 * PAGE);
	say_touch("page3", memory.at + 3 * PAGE);
}

static void outside(const char *backing)
{
	struct memory memory = registered(backing, MISSING);
	char *end = memory.at + memory.pages * PAGE;
	munmap(end - PAGE, PAGE);
	say("beyond", name_of(poison(uffd, end - PAGE, PAGE, NULL)));
	say("unaligned", name_of(poison(uffd, memory.at + 8, PAGE, NULL)));
	say("short", name_of(poison(uffd, memory.at, 8, NULL)));
}

static void part_of_huge_page(const char *backing)
{
	struct memory memory = registered(backing, MISSING);
	say("part", name_of(poison(uffd, memory.at, PAGE, NULL)));
	say("whole", name_of(poison(uffd, memory.at, memory.page, NULL)));
}

static void copy_over(const char *backing)
{
	struct memory memory = marked(backing, MISSING);
	char *from = mmap(NULL, memory.page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	NEED(from != MAP_FAILED);
	memset(from, 7, memory.page);
	say("copy", name_of(copy_pages(uffd, memory.at + memory.page, from, memory.page, NULL)));
	say_touch("touch", memory.at + memory.page);
}

static void copy_range_over(const char *backing)
{
	struct memory memory = marked(backing, MISSING);
	NEED(!poison(uffd, memory.at + 3 * PAGE, PAGE, NULL));
	long long copied;
	say("copy", name_of(copy_pages(uffd, memory.at, page_filled_with(7), 8 * PAGE, &copied)));
	say_number("copied", copied);
	say_touch("page1", memory.at + PAGE);
	say_touch("page3", memory.at + 3 * PAGE);
}

static void continue_over(const char *backing)
{
	struct memory memory = registered(backing, MISSING | MINOR);
	NEED(pwrite(memory.memfd, "\7", 1, PAGE) == 1);
	NEED(!poison(uffd, memory.at + PAGE, PAGE, NULL));
	say("continue", name_of(continue_pages(uffd, memory.at + PAGE, PAGE, NULL)));
	say_touch("touch", memory.at + PAGE);
}

static void zeropage_over(const char *backing)
{
	struct memory memory = marked(backing, MISSING);
	say("zeropage", name_of(zero_pages(uffd, memory.at + PAGE, PAGE)));
	say_touch("touch", memory.at + PAGE);
}

static void drop(const char *backing, int advice)
{
	struct memory memory = marked(backing, MISSING);
	struct toucher toucher;
	say("madvise", name_of(madvise(memory.at + PAGE, PAGE, advice) ? errno : 0));
	start_toucher(&toucher, memory.at + PAGE);
	struct uffd_msg message = read_event(uffd);
	say("event", message.event == UFFD_EVENT_PAGEFAULT ? "pagefault" : "other");
	say_number("offset", (long long)(message.arg.pagefault.address - (uintptr_t)memory.at) & -(long long)PAGE);
	NEED(!zero_pages(uffd, memory.at + PAGE, PAGE));
	join_toucher(&toucher);
}

static void dontneed_registered(const char *backing) { drop(backing, MADV_DONTNEED); }
static void free_registered(const char *backing) { drop(backing, MADV_FREE); }

static void dontneed_unregistered(const char *backing)
{
	struct memory memory = marked(backing, MISSING);
	unregister_memory(uffd, memory);
	say_touch("before", memory.at + PAGE);
	NEED(!madvise(memory.at + PAGE, PAGE, MADV_DONTNEED));
	say_touch("after", memory.at + PAGE);
}

static void other_views(const char *backing)
{
	struct memory memory = registered(backing, MISSING | MINOR);
	NEED(pwrite(memory.memfd, "\7", 1, PAGE) == 1);
	NEED(!poison(uffd, memory.at + PAGE, PAGE, NULL));
	NEED(!poison(uffd, memory.at + 2 * PAGE, PAGE, NULL));
	char *second = mmap(NULL, memory.pages * PAGE, PROT_READ, MAP_SHARED, memory.memfd, 0);
	NEED(second != MAP_FAILED);
	char bytes[2] = {1, 1};
	say_touch("marked", memory.at + PAGE);
	say_touch("mapping_data", second + PAGE);
	say_touch("mapping_hole", second + 2 * PAGE);
	NEED(pread(memory.memfd, bytes, 1, PAGE) == 1 && pread(memory.memfd, bytes + 1, 1, 2 * PAGE) == 1);
	say_number("pread_data", bytes[0]);
	say_number("pread_hole", bytes[1]);
}

static void reads_by_system_calls(const char *backing)
{
	struct memory memory = marked(backing, MISSING);
	char byte, *page = memory.at + PAGE;
	struct iovec here = {&byte, 1}, there = {page, 1};
	say("process_vm_readv", name_of(process_vm_readv(getpid(), &here, 1, &there, 1, 0) < 0 ? errno : 0));
	int ends[2];
	NEED(!pipe(ends));
	say("write", name_of(write(ends[1], page, 1) < 0 ? errno : 0));
	int mem = open("/proc/self/mem", O_RDONLY);
	NEED(mem >= 0);
	say("proc_mem", name_of(pread(mem, &byte, 1, (uintptr_t)page) < 0 ? errno : 0));
	say("populate", name_of(madvise(page, PAGE, MADV_POPULATE_READ) ? errno : 0));
}

static void after_fork(const char *backing)
{
	struct memory memory = marked(backing, MISSING);
	fflush(stdout);
	pid_t child = fork();
	if (!child) {
		say_touch("child", memory.at + PAGE);
		fflush(stdout);
		_exit(0);
	}
	NEED(waitpid(child, NULL, 0) == child);
	say_touch("parent", memory.at + PAGE);
}

static void after_mremap(const char *backing)
{
	struct memory memory = marked(backing, MISSING);
	char *moved = mremap(memory.at, memory.pages * PAGE, memory.pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
			     memory.at + (1 << 30));
	NEED(moved != MAP_FAILED);
	say_touch("touch", moved + PAGE);
}

static void after_mprotect(const char *backing)
{
	struct memory memory = marked(backing, MISSING);
	NEED(!mprotect(memory.at, memory.pages * PAGE, PROT_NONE));
	NEED(!mprotect(memory.at, memory.pages * PAGE, PROT_READ | PROT_WRITE));
	say_touch("touch", memory.at + PAGE);
}

static void after_unregister(const char *backing)
{
	struct memory memory = marked(backing, MISSING);
	unregister_memory(uffd, memory);
	say_touch("touch", memory.at + PAGE);
}

static void after_close(const char *backing)
{
	struct memory memory = marked(backing, MISSING);
	NEED(!close(uffd));
	say_touch("touch", memory.at + PAGE);
}

static void in_pagemap(const char *backing)
{
	struct memory memory = marked(backing, MISSING);
	uint64_t entry;
	int pagemap = open("/proc/self/pagemap", O_RDONLY);
	NEED(pagemap >= 0);
	off_t at = (uintptr_t)(memory.at + memory.page) / PAGE * sizeof entry;
	NEED(pread(pagemap, &entry, sizeof entry, at) == sizeof entry);
	say_hex("entry", entry);
}

/* Without it a pagemap shows no type of a swap entry (capset(2)). */
static void drop_cap_sys_admin(void)
{
	struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct sets[2];
	NEED(syscall(SYS_capget, &header, sets) == 0);
	sets[0].effective &= ~(1u << CAP_SYS_ADMIN);
	NEED(syscall(SYS_capset, &header, sets) == 0);
}

static void in_pagemap_unprivileged(const char *backing)
{
	drop_cap_sys_admin();
	in_pagemap(backing);
}

/* A page on both sides of the marker is mapped. */
static void in_scan(const char *backing)
{
	struct memory memory = marked(backing, MISSING);
	NEED(!copy_pages(uffd, memory.at, page_filled_with(7), PAGE, NULL));
	NEED(!copy_pages(uffd, memory.at + 2 * PAGE, page_filled_with(7), PAGE, NULL));
	struct page_region found[4];
	int pagemap = open("/proc/self/pagemap", O_RDONLY);
	NEED(pagemap >= 0);
	say_number("ranges", scan_pages(pagemap, memory, 0, PAGE_IS_SWAPPED, found, 4));
	say_number("first", (found[0].start - (uintptr_t)memory.at) / PAGE);
	say_number("pages", (found[0].end - found[0].start) / PAGE);
}

static void copy_over_present(const char *backing)
{
	struct memory memory = registered(backing, MISSING);
	NEED(!copy_pages(uffd, memory.at + 2 * PAGE, page_filled_with(7), PAGE, NULL));
	long long copied;
	say("single", name_of(copy_pages(uffd, memory.at + 2 * PAGE, page_filled_with(9), PAGE, &copied)));
	say_number("single_copied", copied);
	say("range", name_of(copy_pages(uffd, memory.at, page_filled_with(9), 4 * PAGE, &copied)));
	say_number("range_copied", copied);
	say_touch("page1", memory.at + PAGE);
	say_touch("page2", memory.at + 2 * PAGE);
}

int main(int argc, char **argv)
{
	static const struct fact facts[] = {
		{"absent", absent},
		{"in-page-cache", in_page_cache},
		{"present", present},
		{"twice", twice},
		{"range-partly-present", range_partly_present},
		{"outside", outside},
		{"part-of-huge-page", part_of_huge_page},
		{"copy-over", copy_over},
		{"copy-range-over", copy_range_over},
		{"continue-over", continue_over},
		{"zeropage-over", zeropage_over},
		{"dontneed-registered", dontneed_registered},
		{"free-registered", free_registered},
		{"dontneed-unregistered", dontneed_unregistered},
		{"other-views", other_views},
		{"reads-by-system-calls", reads_by_system_calls},
		{"after-fork", after_fork},
		{"after-mremap", after_mremap},
		{"after-mprotect", after_mprotect},
		{"after-unregister", after_unregister},
		{"after-close", after_close},
		{"in-pagemap", in_pagemap},
		{"in-pagemap-unprivileged", in_pagemap_unprivileged},
		{"in-scan", in_scan},
		{"copy-over-present", copy_over_present},
		{NULL, NULL},
	};
	return run_fact(facts, argc, argv);
}
