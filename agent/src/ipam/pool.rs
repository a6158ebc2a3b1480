//! Numbers of a fixed interval, given out next-fit and rested after their release. Pods' addresses
//! (as offsets in a range) and endpoint numbers are kept this way. Pure: time is the caller's.

use std::collections::VecDeque;

/// Numbers `first` to `end - 1`.
///
/// Next-fit goes round the whole interval before a number comes again; on top of that a released
/// number rests, so that what still has it cached (peers, flows, DNS) has time to notice. A resting
/// number is used early only when nothing else is free, the longest rested first.
///
/// Times are seconds of one clock that never goes back.
#[derive(Clone, Debug)]
pub struct Pool {
    first: u32,
    end: u32,
    /// A bit for each number from 0 on: used or resting.
    taken: Vec<u64>,
    /// Where the next search starts.
    cursor: u32,
    /// Released numbers and the time of their release, oldest first.
    resting: VecDeque<(u32, u64)>,
    used: u32,
}

impl Pool {
    /// An interval of which nothing is used. Empty when `end <= first`.
    #[must_use]
    pub fn new(first: u32, end: u32) -> Self {
        let end = end.max(first);
        Self {
            first,
            end,
            taken: vec![0; (end as usize).div_ceil(64)],
            cursor: first,
            resting: VecDeque::new(),
            used: 0,
        }
    }

    /// Takes the next number that is free and rested since at least `rest` seconds.
    pub fn take(&mut self, now: u64, rest: u64) -> Option<u32> {
        self.wake(now, rest);
        let number = self
            .next_free(self.cursor, self.end)
            .or_else(|| self.next_free(self.first, self.cursor))?;
        self.mark(number);
        self.used += 1;
        self.cursor = if number + 1 == self.end {
            self.first
        } else {
            number + 1
        };
        Some(number)
    }

    /// Takes the number that has rested longest, although not long enough.
    pub fn take_resting(&mut self) -> Option<u32> {
        let (number, _) = self.resting.pop_front()?;
        self.used += 1;
        Some(number)
    }

    /// Takes this very number, also from its rest. `false`: it is used, or not of this interval.
    pub fn reserve(&mut self, number: u32) -> bool {
        if !self.contains(number) {
            return false;
        }
        if self.is_marked(number) {
            let Some(at) = self.resting.iter().position(|&(n, _)| n == number) else {
                return false;
            };
            self.resting.remove(at);
        }
        self.mark(number);
        self.used += 1;
        true
    }

    /// Gives a number back, to rest from `now`. `false`: it was not used.
    pub fn release(&mut self, number: u32, now: u64) -> bool {
        if !self.is_used(number) {
            return false;
        }
        self.used -= 1;
        self.resting.push_back((number, now));
        true
    }

    /// Gives back a number that nobody has seen: it does not rest.
    pub fn cancel(&mut self, number: u32) -> bool {
        if !self.is_used(number) {
            return false;
        }
        self.used -= 1;
        self.unmark(number);
        true
    }

    /// Enters a number that rested already when the state was saved. Times in the future (another
    /// clock) count as `now`. Ignored when the number is taken or not of this interval.
    pub fn restore_resting(&mut self, number: u32, released: u64, now: u64) {
        if !self.contains(number) || self.is_marked(number) {
            return;
        }
        self.mark(number);
        let released = released.min(now);
        let at = self.resting.partition_point(|&(_, t)| t <= released);
        self.resting.insert(at, (number, released));
    }

    /// Where the next search starts.
    #[must_use]
    pub fn cursor(&self) -> u32 {
        self.cursor
    }

    /// Sets where the next search starts; ignored when not of this interval.
    pub fn set_cursor(&mut self, cursor: u32) {
        if self.contains(cursor) {
            self.cursor = cursor;
        }
    }

    /// Numbers in use.
    #[must_use]
    pub fn used(&self) -> u32 {
        self.used
    }

    /// Numbers of the interval.
    #[must_use]
    pub fn size(&self) -> u32 {
        self.end - self.first
    }

    /// Released numbers and the time of their release, oldest first. Includes those whose rest is
    /// over but which nobody has asked for since.
    pub fn resting(&self) -> impl ExactSizeIterator<Item = (u32, u64)> + '_ {
        self.resting.iter().copied()
    }

    /// Whether the number is given out.
    #[must_use]
    pub fn is_used(&self, number: u32) -> bool {
        self.contains(number)
            && self.is_marked(number)
            && !self.resting.iter().any(|&(n, _)| n == number)
    }

    fn wake(&mut self, now: u64, rest: u64) {
        while let Some(&(number, released)) = self.resting.front() {
            if released.saturating_add(rest) > now {
                break;
            }
            self.resting.pop_front();
            self.unmark(number);
        }
    }

    fn next_free(&self, from: u32, end: u32) -> Option<u32> {
        let mut number = from;
        while number < end {
            let free = !self.taken[number as usize / 64] >> (number % 64);
            if free != 0 {
                let found = number + free.trailing_zeros();
                return (found < end).then_some(found);
            }
            number = (number / 64 + 1) * 64;
        }
        None
    }

    /// Whether the number is of this interval.
    #[must_use]
    pub fn contains(&self, number: u32) -> bool {
        (self.first..self.end).contains(&number)
    }

    fn is_marked(&self, number: u32) -> bool {
        self.taken[number as usize / 64] & (1 << (number % 64)) != 0
    }

    fn mark(&mut self, number: u32) {
        self.taken[number as usize / 64] |= 1 << (number % 64);
    }

    fn unmark(&mut self, number: u32) {
        self.taken[number as usize / 64] &= !(1 << (number % 64));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn goes_round_before_a_number_comes_again() {
        let mut pool = Pool::new(1, 5);
        assert_eq!(pool.take(0, 0), Some(1));
        assert!(pool.release(1, 0));
        for expected in [2, 3, 4, 1] {
            assert_eq!(pool.take(0, 0), Some(expected));
        }
        assert_eq!(pool.take(0, 0), None);
    }

    #[test]
    fn rests_and_gives_way_only_on_request() {
        let mut pool = Pool::new(0, 1);
        assert_eq!(pool.take(100, 60), Some(0));
        assert!(pool.release(0, 100));
        assert_eq!(pool.take(159, 60), None);
        assert_eq!(pool.take(160, 60), Some(0));
        assert!(pool.release(0, 160));
        assert_eq!(pool.take_resting(), Some(0));
        assert_eq!(pool.take_resting(), None);
        assert_eq!(pool.used(), 1);
    }

    #[test]
    fn refuses_what_is_not_its_own() {
        let mut pool = Pool::new(1, 3);
        assert!(!pool.reserve(0));
        assert!(!pool.reserve(3));
        assert!(!pool.release(2, 0));
        assert!(pool.reserve(2));
        assert!(!pool.reserve(2));
        assert!(pool.release(2, 0));
        assert!(!pool.release(2, 0));
        assert!(pool.reserve(2), "also from its rest");
        assert!(pool.cancel(2));
        assert_eq!((pool.used(), pool.resting().len()), (0, 0));
    }

    #[test]
    fn an_empty_interval_has_nothing() {
        let mut pool = Pool::new(7, 3);
        assert_eq!((pool.size(), pool.take(0, 0)), (0, None));
    }
}
