//! Asks a seccomp filter for its answer before a call is run: an interpreter of its classic BPF, seccomp(2). Pure.
//!
//! A filter that kills does so before a tracer could step in, so this is the only way to leave the process unharmed.

use libc::{
    BPF_A, BPF_ABS, BPF_ADD, BPF_ALU, BPF_AND, BPF_DIV, BPF_IMM, BPF_JA, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JMP, BPF_JSET,
    BPF_LD, BPF_LDX, BPF_LEN, BPF_LSH, BPF_MEM, BPF_MISC, BPF_MUL, BPF_NEG, BPF_OR, BPF_RET, BPF_RSH, BPF_ST, BPF_STX,
    BPF_SUB, BPF_TAX, BPF_X, BPF_XOR, sock_filter,
};

/// `AUDIT_ARCH_X86_64`.
const ARCH: u32 = 0xC000_003E;
const DATA_BYTES: usize = 64;
const SCRATCH_WORDS: usize = 16;
const ACTION_MASK: u32 = libc::SECCOMP_RET_ACTION_FULL;

/// A call as the filter sees it, `struct seccomp_data`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Data([u8; DATA_BYTES]);

impl Data {
    /// Of a call by an instruction that ends at `ip`.
    pub(super) fn new(number: u64, ip: u64, arguments: [u64; 6]) -> Self {
        let mut data = [0; DATA_BYTES];
        data[..4].copy_from_slice(&(number as u32).to_ne_bytes());
        data[4..8].copy_from_slice(&ARCH.to_ne_bytes());
        data[8..16].copy_from_slice(&ip.to_ne_bytes());
        for (at, argument) in data[16..].chunks_exact_mut(8).zip(arguments) {
            at.copy_from_slice(&argument.to_ne_bytes());
        }
        Self(data)
    }

    fn word(&self, at: u32) -> Option<u32> {
        let at = at as usize;
        Some(u32::from_ne_bytes(self.0.get(at..at + 4)?.try_into().ok()?))
    }
}

/// The strictest answer of several filters, as the kernel takes it; `None`: one is not understood.
pub(super) fn answer(filters: &[Vec<sock_filter>], data: &Data) -> Option<u32> {
    let answers = filters.iter().map(|filter| Some(run(filter, data)? & ACTION_MASK)).collect::<Option<Vec<_>>>()?;
    Some(answers.into_iter().min_by_key(|action| action.cast_signed()).unwrap_or(libc::SECCOMP_RET_ALLOW))
}

/// The name of an answer that does not let the call through; `None`: it does.
pub(super) fn refusal(answer: Option<u32>) -> Option<&'static str> {
    match answer {
        Some(libc::SECCOMP_RET_ALLOW | libc::SECCOMP_RET_LOG) => None,
        Some(libc::SECCOMP_RET_KILL_PROCESS) => Some("KILL_PROCESS"),
        Some(libc::SECCOMP_RET_KILL_THREAD) => Some("KILL_THREAD"),
        Some(libc::SECCOMP_RET_TRAP) => Some("TRAP"),
        Some(libc::SECCOMP_RET_ERRNO) => Some("ERRNO"),
        Some(libc::SECCOMP_RET_TRACE) => Some("TRACE"),
        Some(libc::SECCOMP_RET_USER_NOTIF) => Some("USER_NOTIF"),
        _ => Some("what is not understood"),
    }
}

/// The machine of classic BPF.
#[derive(Debug, Default)]
struct Machine {
    a: u32,
    x: u32,
    scratch: [u32; SCRATCH_WORDS],
}

fn run(filter: &[sock_filter], data: &Data) -> Option<u32> {
    let mut machine = Machine::default();
    let mut at = 0;
    // Jumps only go forward, so this ends.
    loop {
        let step = filter.get(at)?;
        at += 1;
        let code = u32::from(step.code);
        match code & 0x07 {
            BPF_RET => return Some(if code & 0x18 == BPF_A { machine.a } else { step.k }),
            BPF_JMP if code & 0xf0 == BPF_JA => at += step.k as usize,
            BPF_JMP => at += usize::from(if machine.jumps(code, step.k)? { step.jt } else { step.jf }),
            BPF_LD => machine.a = machine.load(code, step.k, data)?,
            BPF_LDX => machine.x = machine.load(code, step.k, data)?,
            BPF_ST => *machine.scratch.get_mut(step.k as usize)? = machine.a,
            BPF_STX => *machine.scratch.get_mut(step.k as usize)? = machine.x,
            BPF_ALU => machine.a = machine.compute(code, step.k)?,
            BPF_MISC if code & 0xf8 == BPF_TAX => machine.x = machine.a,
            _ => machine.a = machine.x,
        }
    }
}

impl Machine {
    fn load(&self, code: u32, k: u32, data: &Data) -> Option<u32> {
        match code & 0xe0 {
            BPF_IMM => Some(k),
            BPF_ABS => data.word(k),
            BPF_MEM => self.scratch.get(k as usize).copied(),
            BPF_LEN => Some(DATA_BYTES as u32),
            _ => None,
        }
    }

    fn operand(&self, code: u32, k: u32) -> u32 {
        if code & BPF_X == 0 { k } else { self.x }
    }

    fn jumps(&self, code: u32, k: u32) -> Option<bool> {
        let operand = self.operand(code, k);
        match code & 0xf0 {
            BPF_JEQ => Some(self.a == operand),
            BPF_JGT => Some(self.a > operand),
            BPF_JGE => Some(self.a >= operand),
            BPF_JSET => Some(self.a & operand != 0),
            _ => None,
        }
    }

    fn compute(&self, code: u32, k: u32) -> Option<u32> {
        let operand = self.operand(code, k);
        match code & 0xf0 {
            BPF_ADD => Some(self.a.wrapping_add(operand)),
            BPF_SUB => Some(self.a.wrapping_sub(operand)),
            BPF_MUL => Some(self.a.wrapping_mul(operand)),
            BPF_DIV => self.a.checked_div(operand),
            BPF_AND => Some(self.a & operand),
            BPF_OR => Some(self.a | operand),
            BPF_XOR => Some(self.a ^ operand),
            BPF_LSH => Some(self.a.wrapping_shl(operand)),
            BPF_RSH => Some(self.a.wrapping_shr(operand)),
            BPF_NEG => Some(self.a.wrapping_neg()),
            _ => None,
        }
    }
}
