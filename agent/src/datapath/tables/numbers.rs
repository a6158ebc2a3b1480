//! Hands out numbers of rows, the lowest free one first, so that the used part of a table stays
//! small. Pure bookkeeping, without I/O.

use std::{cmp::Reverse, collections::BinaryHeap};

/// Numbers from `first` up to, not including, `end`.
#[derive(Debug)]
pub struct Numbers {
    first: u32,
    next: u32,
    end: u32,
    free: BinaryHeap<Reverse<u32>>,
}

impl Numbers {
    /// All free.
    #[must_use]
    pub fn new(first: u32, end: u32) -> Self {
        Self {
            first,
            next: first,
            end,
            free: BinaryHeap::new(),
        }
    }

    /// With `used`, which ascend, taken.
    #[must_use]
    pub fn with_used(first: u32, end: u32, used: impl IntoIterator<Item = u32>) -> Self {
        let mut numbers = Self::new(first, end);
        for number in used {
            numbers.free.extend((numbers.next..number).map(Reverse));
            numbers.next = number + 1;
        }
        numbers
    }

    /// The lowest free number, or `None` if all are taken.
    pub fn allocate(&mut self) -> Option<u32> {
        if let Some(Reverse(number)) = self.free.pop() {
            return Some(number);
        }
        (self.next < self.end).then(|| {
            self.next += 1;
            self.next - 1
        })
    }

    /// Gives a number back.
    pub fn free(&mut self, number: u32) {
        self.free.push(Reverse(number));
    }

    /// Numbers taken.
    #[must_use]
    pub fn used(&self) -> u32 {
        self.next - self.first - self.free.len() as u32
    }

    /// Numbers there are.
    #[must_use]
    pub fn total(&self) -> u32 {
        self.end - self.first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_number_comes_first() {
        let mut numbers = Numbers::with_used(1, 8, [2, 5]);
        assert_eq!((numbers.used(), numbers.total()), (2, 7));
        let taken: Vec<u32> = std::iter::from_fn(|| numbers.allocate()).collect();
        assert_eq!(taken, [1, 3, 4, 6, 7]);
        numbers.free(6);
        numbers.free(2);
        assert_eq!(numbers.allocate(), Some(2));
        assert_eq!(numbers.used(), 6);
    }
}
