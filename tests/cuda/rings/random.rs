//! Saves one after the other, at random.

use super::*;

/// Numbers that look random, the same in each run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % most
    }

    fn shape(&mut self) -> Vec<(usize, Option<u32>)> {
        let gpus = 1 + self.below(2);
        let mut shape = vec![(1 + self.below(30_000) as usize, Some(0))];
        for _ in 0..self.below(14) {
            let bytes = match self.below(4) {
                0 => 0,
                1 => 1 + self.below(100) as usize,
                2 => 1 + self.below(30_000) as usize,
                _ => (CHUNK * self.below(8)) as usize,
            };
            let place = (self.below(4) > 0).then(|| self.below(gpus) as u32);
            shape.push((bytes, place));
        }
        shape
    }
}

/// `ROUNDS` and `SEED` ask for more of them, and others.
#[test]
fn states_and_pools_and_ends_of_all_kinds() {
    let number = |name, or: u64| std::env::var(name).map_or(or, |said| said.parse().expect("a number"));
    let mut dice = Dice(number("SEED", 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    for round in 0..number("ROUNDS", 40) {
        let standin = Standin::take();
        let streams = [standin.stream(0), standin.stream(1)];
        let (shape, buffers) = (dice.shape(), 4 + dice.below(12));
        let sim = medium();
        let store = open(&sim, CHUNK, buffers, Faults::default());
        let mut state = State::new(&standin, &shape);
        let mut host = State::new(&standin, &[(60_000, None)]);
        println!("round {round}: {buffers} buffers, {shape:?}");
        standin.delay_us(dice.below(300));
        let mut saved = None;
        for step in 1..6 {
            state.fill(|device| streams[device as usize], step, 0);
            (0..2).for_each(|device| standin.synchronize(device, streams[device as usize]));
            let hold =
                (dice.below(3) == 0).then(|| sim.hold(|attempt| attempt.kind == AttemptKind::StartCopy));
            let (what, pause) = (dice.below(8), Duration::from_micros(dice.below(3000)));
            let save = state.begin(&store, step, queued(Stream(0), PROMPT)).expect("begin");
            let beside = (what == 0).then(|| {
                host.fill(|_| streams[0], step + 100, 0);
                let options = SaveOptions { wait: WAIT, ..SaveOptions::DEFAULT };
                host.begin(&store, step + 100, options).expect("begin")
            });
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(pause);
                    hold.into_iter().for_each(|hold| sim.release(hold));
                });
                if what != 1 {
                    streams.iter().for_each(|&stream| stream_wait(&save, stream).expect("wait"));
                }
            });
            if what == 1 || what == 2 {
                save.cancel();
            } else {
                state.fill(|device| streams[device as usize], step + 50, 0);
            }
            let ended = save.wait_durable(WAIT);
            let what = format!("round {round} step {step}");
            if let Some(beside) = beside {
                beside.wait_durable(WAIT).expect("beside");
                assert!(host.is_saved(&store, step + 100), "{what}");
                saved = None;
            } else if let Err(error) = ended {
                assert_eq!(error.kind(), ErrorKind::Cancelled, "{what}");
                assert!(saved.is_none_or(|step| state.is_saved(&store, step)), "{what}");
            } else {
                assert!(save.progress().copied, "{what}");
                assert!(state.is_saved(&store, step), "{what}");
                saved = Some(step);
            }
            (0..2).for_each(|device| standin.synchronize(device, streams[device as usize]));
        }
        assert_idle(&store);
        let save = state.begin(&store, 9, queued(Stream(0), PROMPT)).expect("begin");
        std::thread::sleep(Duration::from_micros(dice.below(2000)));
        drop((store, save, state, host));
        streams.iter().for_each(|&stream| standin.destroy(stream));
        standin.assert_clean(&format!("round {round}"));
    }
}
