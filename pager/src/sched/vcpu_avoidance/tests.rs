use super::*;

fn own_tid() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get() as u32
}

#[test]
fn it_is_known_where_a_thread_runs() {
    let allowed = CpuSet::allowed();
    std::thread::spawn(move || {
        for only in CpuSet::each_allowed() {
            only.pin();
            let (thread, cpu) = (own_tid(), rustix::thread::sched_getcpu());
            assert_eq!(cpu_of(std::process::id(), thread), Some(cpu));
            assert_ne!(allowed.without(cpu), allowed);
        }
        assert_eq!(cpu_of(std::process::id(), u32::MAX), None);
    })
    .join()
    .unwrap();
}

#[test]
fn the_cpu_of_a_vcpu_is_left_to_it() {
    std::thread::spawn(|| {
        let each = CpuSet::each_allowed();
        if each.len() < 2 {
            return eprintln!("skipped: only one CPU");
        }
        let (start, mut avoidance) = (Instant::now(), VcpuAvoidance::new(std::process::id()));
        for (n, cpu) in [0, 1, 1, 0].into_iter().enumerate() {
            let (vcpu, end) = (std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
            let at = each[cpu].clone();
            let other = std::thread::spawn(move || {
                at.pin();
                vcpu.0.send(own_tid()).unwrap();
                let _ = end.1.recv();
            });
            avoidance.step(start + AFFINITY_POLL * n as u32, vcpu.1.recv().unwrap());
            let rest = CpuSet::each_allowed();
            assert!(!rest.contains(&each[cpu]) && rest.len() == each.len() - 1, "{rest:?}");
            drop(end.0);
            other.join().unwrap();
        }
        avoidance.step(start + AFFINITY_POLL * 9, u32::MAX);
        assert_eq!(CpuSet::each_allowed(), each, "it may be anywhere again");
        avoidance.step(start + AFFINITY_POLL * 20, own_tid());
        assert_eq!(CpuSet::each_allowed().len(), each.len() - 1);
        avoidance.end();
        assert_eq!(CpuSet::each_allowed(), each);
    })
    .join()
    .unwrap();
}
