/* Dirty tracking of another process's memory: WP_ASYNC and PAGEMAP_SCAN (Linux 6.7). */
#include "facts.h"

struct page_region {
	uint64_t start, end, categories;
};

struct pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define PAGEMAP_SCAN _IOWR('f', 16, struct pm_scan_arg)
#define PAGE_IS_WRITTEN (1ULL << 1)
#define PM_SCAN_WP_MATCHING (1ULL << 0)
#define PM_SCAN_CHECK_WPASYNC (1ULL << 1)
#define UFFD_FEATURE_WP_UNPOPULATED_BIT (1ULL << 13)

static void scan(int pagemap, struct memory memory, const char *key)
{
	struct page_region found[64];
	struct pm_scan_arg request = {
		.size = sizeof request,
		.flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
		.start = (uintptr_t)memory.at,
		.end = (uintptr_t)memory.at + memory.pages * PAGE,
		.vec = (uintptr_t)found,
		.vec_len = 64,
		.category_mask = PAGE_IS_WRITTEN,
		.return_mask = PAGE_IS_WRITTEN,
	};
	int count = ioctl(pagemap, PAGEMAP_SCAN, &request);
	NEED(count >= 0);
	printf("%s=", key);
	for (int i = 0; i < count; i++)
		for (uint64_t page = found[i].start; page < found[i].end; page += PAGE)
			printf("%s%lu", page == found[0].start ? "" : ",", (page - (uintptr_t)memory.at) / PAGE);
	puts("");
}

static void written_since_last_scan(const char *backing)
{
	int uffd = open_uffd(0, FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED_BIT);
	struct memory memory = map_memory(backing, 64);
	memset(memory.at, 1, 64 * PAGE);
	register_memory(uffd, memory, UFFDIO_REGISTER_MODE_WP);
	int pagemap = open("/proc/self/pagemap", O_RDONLY);
	NEED(pagemap >= 0);
	scan(pagemap, memory, "first");
	scan(pagemap, memory, "nothing");
	memory.at[3 * PAGE] = 2;
	memory.at[17 * PAGE] = 2;
	memory.at[18 * PAGE] = 2;
	(void)*(volatile char *)(memory.at + 40 * PAGE);
	scan(pagemap, memory, "written");
	scan(pagemap, memory, "after");
}

int main(int argc, char **argv)
{
	static const struct fact facts[] = {{"written-since-last-scan", written_since_last_scan}, {NULL, NULL}};
	return run_fact(facts, argc, argv);
}
