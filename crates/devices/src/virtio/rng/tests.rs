use super::super::driver::Driver;
use super::*;

struct Counting(u8);

impl Entropy for Counting {
    fn fill(&mut self, data: &mut [u8]) -> std::io::Result<()> {
        for byte in data {
            self.0 = self.0.wrapping_add(1);
            *byte = self.0;
        }
        Ok(())
    }
}

#[test]
fn random_bytes_fill_all_buffers_of_a_request() {
    let mut driver = Driver::start(Box::new(Rng::new(Box::new(Counting(0)))), 0);
    let (first, second) = (driver.room(10), driver.room(6));
    let head = driver.add(0, &[], &[(first, 10), (second, 6)]);
    driver.tell(0);
    assert_eq!(driver.poll(0), Some((head, 16)));
    assert_eq!(driver.bytes(first, 10), (1..=10).collect::<Vec<u8>>());
    assert_eq!(driver.bytes(second, 6), (11..=16).collect::<Vec<u8>>());
    assert_eq!(*driver.counter.messages.lock().unwrap(), [1]);
}

#[test]
fn the_host_gives_different_bytes_each_time() {
    let mut driver = Driver::start(Box::new(Rng::new(Box::new(HostEntropy))), 0);
    let (first, second) = (driver.room(32), driver.room(32));
    driver.add(0, &[], &[(first, 32)]);
    driver.add(0, &[], &[(second, 32)]);
    driver.tell(0);
    driver.wait(0);
    driver.wait(0);
    assert_ne!(driver.bytes(first, 32), driver.bytes(second, 32));
}

#[test]
fn a_huge_request_gets_a_bounded_answer() {
    let mut driver = Driver::start(Box::new(Rng::new(Box::new(HostEntropy))), 0);
    let room = driver.room(1 << 20);
    driver.add(0, &[], &[(room, 1 << 20)]);
    driver.tell(0);
    assert_eq!(driver.wait(0).1, 4096);
}

#[test]
fn a_readable_buffer_gets_nothing() {
    let mut driver = Driver::start(Box::new(Rng::new(Box::new(HostEntropy))), 0);
    let room = driver.buffer(&[7; 16]);
    driver.add(0, &[(room, 16)], &[]);
    driver.tell(0);
    assert_eq!(driver.wait(0).1, 0);
    assert_eq!(driver.bytes(room, 16), [7; 16]);
}
