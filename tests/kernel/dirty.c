/* Dirty tracking of another process's memory: WP_ASYNC and PAGEMAP_SCAN (Linux 6.7). */
#include "facts.h"

#define PM_SCAN_WP_MATCHING (1ULL << 0)
#define PM_SCAN_CHECK_WPASYNC (1ULL << 1)
#define UFFD_FEATURE_WP_UNPOPULATED_BIT (1ULL << 13)

static void scan(int pagemap, struct memory memory, const char *key)
{
	struct page_region found[64];
	int count = scan_pages(pagemap, memory, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, PAGE_IS_WRITTEN, found, 64);
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
