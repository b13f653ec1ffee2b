/* How KVM tells of a poisoned page, and how a machine check gets into a guest. */
#include "facts.h"
#include <linux/kvm.h>

#ifndef KVM_EXIT_MEMORY_FAULT
#define KVM_EXIT_MEMORY_FAULT 39
#endif
#define CODE 0x10000UL	/* guest-physical address of the code */
#define BAD 0x40000UL	/* page that carries the marker, or has not arrived */
#define TABLES 0x20000UL
#define RAM (1UL << 20)
#define BANK 9
#define MC9_ADDR (0x400 + 4 * BANK + 2)

static int kvm, vm, vcpu, uffd;
static struct memory ram;
static struct kvm_run *run;
static pthread_t vcpu_thread;

static void make_vm(const char *backing)
{
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0)
		LACKING("/dev/kvm: %s", strerrorname_np(errno));
	NEED((vm = ioctl(kvm, KVM_CREATE_VM, 0)) >= 0);
	ram = map_memory(backing, RAM / PAGE);
	struct kvm_userspace_memory_region slot = {.memory_size = RAM, .userspace_addr = (uintptr_t)ram.at};
	NEED(!ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot));
	NEED((vcpu = ioctl(vm, KVM_CREATE_VCPU, 0)) >= 0);
	run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	NEED(run != MAP_FAILED);
}

/* All of RAM is present but the bad page, which is absent and registered. */
static void leave_bad_page_absent(unsigned long long features)
{
	uffd = open_uffd(0, FEATURE_POISON | features);
	NEED(!madvise(ram.at + BAD, PAGE, ram.memfd < 0 ? MADV_DONTNEED : MADV_REMOVE));
	NEED(!register_range(uffd, ram.at + BAD, PAGE, UFFDIO_REGISTER_MODE_MISSING));
}

/* KVM takes EFER.LME only of a processor whose CPUID has long mode. */
static void give_cpuid(void)
{
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid = {.head.nent = 256};
	NEED(!ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
	NEED(!ioctl(vcpu, KVM_SET_CPUID2, &cpuid));
}

static void start_in_real_mode(uint64_t flags)
{
	struct kvm_sregs sregs;
	struct kvm_regs regs = {.rip = 0, .rflags = 2, .rsp = 0x8000};
	NEED(!ioctl(vcpu, KVM_GET_SREGS, &sregs));
	sregs.cs.base = CODE, sregs.cs.selector = CODE >> 4;
	sregs.ds.base = BAD, sregs.ds.selector = BAD >> 4;
	sregs.ss.base = 0, sregs.ss.selector = 0;
	sregs.cr4 |= flags;
	NEED(!ioctl(vcpu, KVM_SET_SREGS, &sregs));
	NEED(!ioctl(vcpu, KVM_SET_REGS, &regs));
}

/* 64-bit ring 3 with the first 2 MiB mapped one to one: what a workload is. */
static void start_in_ring_3(void)
{
	uint64_t *tables = (uint64_t *)(ram.at + TABLES);
	give_cpuid();
	tables[0] = (TABLES + PAGE) | 7;
	tables[512] = (TABLES + 2 * PAGE) | 7;
	tables[1024] = 0x80 | 7;
	struct kvm_sregs sregs;
	struct kvm_regs regs = {.rip = CODE, .rflags = 2, .rsp = 0x8000};
	NEED(!ioctl(vcpu, KVM_GET_SREGS, &sregs));
	struct kvm_segment code = {.limit = ~0U, .selector = 0x1b, .type = 11, .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1};
	struct kvm_segment data = code;
	data.type = 3, data.selector = 0x23, data.l = 0, data.db = 1;
	sregs.cs = code;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.cr3 = TABLES;
	sregs.cr4 |= 1 << 5;
	sregs.cr0 = 0x80000001 | 1 << 4;
	sregs.efer |= 1 << 8 | 1 << 10;
	NEED(!ioctl(vcpu, KVM_SET_SREGS, &sregs));
	NEED(!ioctl(vcpu, KVM_SET_REGS, &regs));
}

static volatile int bus_errors, bus_code, bus_lsb, bus_in_vcpu_thread;
static char *volatile bus_address;

static void on_vcpu_sigbus(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	bus_errors++;
	bus_code = info->si_code, bus_lsb = info->si_addr_lsb, bus_address = info->si_addr;
	bus_in_vcpu_thread = pthread_equal(pthread_self(), vcpu_thread);
	run->immediate_exit = 1;
}

/* Runs the vCPU until something other than a stray signal ends it; says how it was told of the page. */
static void run_into_the_page(void)
{
	struct sigaction action = {.sa_sigaction = on_vcpu_sigbus, .sa_flags = SA_SIGINFO};
	NEED(!sigaction(SIGBUS, &action, NULL));
	vcpu_thread = pthread_self();
	int error;
	do {
		error = ioctl(vcpu, KVM_RUN, 0) ? errno : 0;
	} while (error == EINTR && !bus_errors);
	if (bus_errors) {
		say("told", "sigbus");
		say("run", name_of(error));
		say("code", bus_code == BUS_MCEERR_AR ? "BUS_MCEERR_AR" : "other");
		say_number("lsb", bus_lsb);
		say_hex("gpa", bus_address - ram.at);
		say_number("in_vcpu_thread", bus_in_vcpu_thread);
		run->immediate_exit = 0;
	} else if (run->exit_reason == KVM_EXIT_MMIO) {
		say("told", "mmio");
		say_hex("gpa", run->mmio.phys_addr);
	} else if (run->exit_reason == KVM_EXIT_MEMORY_FAULT) {
		say("told", "memory_fault");
		uint64_t gpa;
		memcpy(&gpa, (char *)&run->mmio + 8, sizeof gpa);
		say_hex("gpa", gpa);
	} else {
		printf("told=exit %u, errno %s\n", run->exit_reason, name_of(error));
	}
}

static void ring_3_touch(const char *backing)
{
	static const unsigned char code[] = {0x48, 0xa1, 8, 0, 4, 0, 0, 0, 0, 0, /* mov rax, [BAD + 8] */ 0xeb, 0xfe /* jmp . */};
	make_vm(backing);
	memset(ram.at, 0, RAM);
	memcpy(ram.at + CODE, code, sizeof code);
	leave_bad_page_absent(0);
	NEED(!poison(uffd, ram.at + BAD, PAGE, NULL));
	start_in_ring_3();
	run_into_the_page();
}

/* The frame itself goes bad. */
static void ring_3_touch_of_a_frame(const char *backing)
{
	static const unsigned char code[] = {0x48, 0xa1, 8, 0, 4, 0, 0, 0, 0, 0, /* mov rax, [BAD + 8] */ 0xeb, 0xfe /* jmp . */};
	make_vm(backing);
	memset(ram.at, 0, RAM);
	memcpy(ram.at + CODE, code, sizeof code);
	ram.at[BAD] = 7;
	fail_frame(ram.at + BAD, PAGE);
	start_in_ring_3();
	run_into_the_page();
}

static const unsigned char real_mode_touch[] = {0xa1, 0, 0, /* mov ax, [BAD] */ 0xf4 /* hlt */};

static void real_mode_touch_of_poison(const char *backing)
{
	make_vm(backing);
	memset(ram.at, 0, RAM);
	memcpy(ram.at + CODE, real_mode_touch, sizeof real_mode_touch);
	leave_bad_page_absent(0);
	NEED(!poison(uffd, ram.at + BAD, PAGE, NULL));
	start_in_real_mode(0);
	run_into_the_page();
}

static void real_mode_touch_of_a_frame(const char *backing)
{
	make_vm(backing);
	memset(ram.at, 0, RAM);
	memcpy(ram.at + CODE, real_mode_touch, sizeof real_mode_touch);
	ram.at[BAD] = 7;
	fail_frame(ram.at + BAD, PAGE);
	start_in_real_mode(0);
	run_into_the_page();
}

static volatile int vcpu_tid;

static void *run_to_halt(void *unused)
{
	vcpu_tid = syscall(SYS_gettid);
	NEED(!ioctl(vcpu, KVM_RUN, 0) && run->exit_reason == KVM_EXIT_HLT);
	return unused;
}

static void missing_page(const char *backing)
{
	make_vm(backing);
	memset(ram.at, 0, RAM);
	memcpy(ram.at + CODE, real_mode_touch, sizeof real_mode_touch);
	leave_bad_page_absent(UFFD_FEATURE_THREAD_ID);
	start_in_real_mode(0);
	pthread_t thread;
	NEED(!pthread_create(&thread, NULL, run_to_halt, NULL));
	struct uffd_msg message = read_event(uffd);
	say_hex("gpa", message.arg.pagefault.address - (uintptr_t)ram.at);
	say_number("same_thread", (int)message.arg.pagefault.feat.ptid == vcpu_tid);
	NEED(!copy_pages(uffd, ram.at + BAD, page_filled_with(7), PAGE, NULL));
	NEED(!pthread_join(thread, NULL));
	struct kvm_regs regs;
	NEED(!ioctl(vcpu, KVM_GET_REGS, &regs));
	say_hex("guest_read", regs.rax & 0xffff);
}

static void set_mce(int with_cr4_mce)
{
	/* Spins until the machine check; its handler reads the bank's address and clears MCG_STATUS, then halts. */
	static const unsigned char spin[] = {0xeb, 0xfe};
	static const unsigned char handler[] = {
		0x66, 0xb9, MC9_ADDR & 0xff, MC9_ADDR >> 8, 0, 0, /* mov ecx, MC9_ADDR */
		0x0f, 0x32,					  /* rdmsr */
		0x66, 0x89, 0xc3,				  /* mov ebx, eax */
		0x66, 0xb9, 0x7a, 0x01, 0, 0,			  /* mov ecx, MCG_STATUS */
		0x66, 0x31, 0xc0, 0x66, 0x31, 0xd2,		  /* xor eax, eax; xor edx, edx */
		0x0f, 0x30,					  /* wrmsr */
		0xf4,						  /* hlt */
	};
	uint64_t capabilities = 0x0100010aULL; /* 10 banks, MCG_CTL_P, MCG_SER_P */
	NEED(!ioctl(vcpu, KVM_X86_SETUP_MCE, &capabilities));
	memset(ram.at, 0, RAM);
	memcpy(ram.at + CODE, spin, sizeof spin);
	memcpy(ram.at + CODE + 0x100, handler, sizeof handler);
	uint16_t vector[2] = {0x100, CODE >> 4};
	memcpy(ram.at + 18 * 4, vector, sizeof vector);
	start_in_real_mode(with_cr4_mce ? 1 << 6 : 0);
	struct kvm_x86_mce mce = {
		.status = 1ULL << 63 | 1ULL << 61 | 1ULL << 60 | 1ULL << 59 | 1ULL << 58 | 1ULL << 56 | 1ULL << 55 | 0x134,
		.addr = BAD,
		.misc = 2 << 6 | 0xc,
		.mcg_status = 7,
		.bank = BANK,
	};
	say("set", name_of(ioctl(vcpu, KVM_X86_SET_MCE, &mce) ? errno : 0));
	NEED(!ioctl(vcpu, KVM_RUN, 0));
	printf("exit=%s\n", run->exit_reason == KVM_EXIT_HLT	    ? "hlt"
			    : run->exit_reason == KVM_EXIT_SHUTDOWN ? "shutdown"
								    : "other");
	struct kvm_regs regs;
	NEED(!ioctl(vcpu, KVM_GET_REGS, &regs));
	say_hex("address_in_guest", regs.rbx);
}

/* What a guest sees of the capabilities that its VMM sets up. */
static void capabilities(const char *backing)
{
	make_vm(backing);
	uint64_t wanted = 0x0100010aULL;
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} read = {{.nmsrs = 1}, {.index = 0x179}}; /* IA32_MCG_CAP */
	say("setup", name_of(ioctl(vcpu, KVM_X86_SETUP_MCE, &wanted) ? errno : 0));
	NEED(ioctl(vcpu, KVM_GET_MSRS, &read) == 1);
	say_hex("mcg_cap", read.entry.data);
}

static void injected(const char *backing)
{
	make_vm(backing);
	set_mce(1);
}

static void injected_without_cr4_mce(const char *backing)
{
	make_vm(backing);
	set_mce(0);
}

int main(int argc, char **argv)
{
	static const struct fact facts[] = {
		{"ring-3-touch", ring_3_touch},
		{"ring-3-touch-of-a-frame", ring_3_touch_of_a_frame},
		{"real-mode-touch", real_mode_touch_of_poison},
		{"real-mode-touch-of-a-frame", real_mode_touch_of_a_frame},
		{"missing-page", missing_page},
		{"capabilities", capabilities},
		{"injected", injected},
		{"injected-without-cr4-mce", injected_without_cr4_mce},
		{NULL, NULL},
	};
	return run_fact(facts, argc, argv);
}
