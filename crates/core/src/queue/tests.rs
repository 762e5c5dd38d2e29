//! Tests of queues.

use super::*;

use proptest::prelude::*;

fn at(seconds: f64) -> Duration {
    Duration::from_secs_f64(seconds)
}

/// Records an arrival and returns the queue key of the request.
fn arrive(
    queue: &mut QueueTickets,
    order: QueueOrder,
    tenant: u64,
    prefill: f64,
    now: f64,
) -> QueueKey {
    let ticket = queue.ticket(order, 0, tenant, at(now));
    queue.on_arrival(&ticket, at(prefill));
    ticket.queue_key(prefill)
}

#[test]
fn fcfs_orders_by_arrival_within_a_priority() {
    let mut queue = QueueTickets::default();
    let long = arrive(&mut queue, QueueOrder::Fcfs, 0, 9.0, 1.0);
    let short = arrive(&mut queue, QueueOrder::Fcfs, 0, 0.1, 1.0);
    assert!(long < short);
    let urgent = queue
        .ticket(QueueOrder::Fcfs, -1, 0, at(2.0))
        .queue_key(9.0);
    assert!(urgent < long);
}

#[test]
fn shorter_prompts_overtake_until_ageing_outweighs_them() {
    let mut queue = QueueTickets::default();
    let long = arrive(&mut queue, QueueOrder::ShortestPrefillFirst, 0, 2.0, 0.0);
    assert!(arrive(&mut queue, QueueOrder::ShortestPrefillFirst, 0, 1.0, 9.9) < long);
    assert!(arrive(&mut queue, QueueOrder::ShortestPrefillFirst, 0, 1.0, 10.1) > long);
}

#[test]
fn smaller_requests_backfill_until_the_window_of_the_larger_passes() {
    let (mut policy_state, mut queue) = (QueueTickets::default(), WorkerQueue::default());
    let mut next_after_insert = |order, priority, prefill, blocks| {
        let ticket = policy_state.ticket(order, priority, 0, at(0.0));
        policy_state.on_arrival(&ticket, at(prefill));
        let serial = ticket.arrival_number;
        let booking = BookingId { serial, index: 0 };
        let memory = (blocks, OutputReservation::default());
        queue.insert(
            ticket.queue_key(prefill),
            booking,
            PrefillWork::default(),
            memory,
        );
        let next = |free_blocks, now| {
            let next = queue.next_dispatchable(at(now), |blocks, _| blocks <= free_blocks);
            next.map(|(_, booking, _)| booking.serial)
        };
        (next(9, 0.0), next(9, 29.9), next(9, 30.1), next(100, 0.0))
    };
    assert_eq!(
        next_after_insert(QueueOrder::ShortestPrefillFirst, 0, 1.0, 50),
        (None, None, Some(0), Some(0))
    );
    // A request of lower priority does not pass.
    assert_eq!(
        next_after_insert(QueueOrder::ShortestPrefillFirst, 1, 0.1, 5),
        (None, None, Some(0), Some(0))
    );
    let backfilled = next_after_insert(QueueOrder::ShortestPrefillFirst, 0, 2.0, 5);
    assert_eq!(backfilled, (Some(2), Some(2), Some(0), Some(0)));
    // Under fcfs the engine itself handles the lack of memory.
    let first = next_after_insert(QueueOrder::Fcfs, -1, 1.0, 50);
    assert_eq!(first, (Some(3), Some(3), Some(3), Some(3)));
}

#[test]
fn tenants_get_equal_service_whatever_their_demand() {
    let mut queue = QueueTickets::default();
    let mut queued = Vec::new();
    // Tenant 1 has many requests, tenant 2 few, and tenant 3 long ones.
    for (tenant, requests, seconds) in [(1, 400, 1.0), (2, 30, 1.0), (3, 40, 5.0)] {
        for _ in 0..requests {
            let ticket = queue.ticket(QueueOrder::FairByTenant, 0, tenant, at(0.0));
            queue.on_arrival(&ticket, at(seconds));
            queued.push((ticket.queue_key(seconds), ticket, seconds));
        }
    }
    queued.sort_unstable_by_key(|(key, ..)| *key);
    let mut served = HashMap::<u64, f64>::new();
    for (_, ticket, seconds) in queued.into_iter().take(64) {
        queue.on_dispatch(&ticket);
        *served.entry(ticket.tenant).or_default() += seconds;
    }
    let service: Vec<f64> = served.into_values().collect();
    assert_eq!(service.len(), 3);
    for seconds in &service {
        assert!((seconds - service[0]).abs() <= 5.0, "{service:?}");
    }
    // A tenant that was idle gains no credit.
    let start_tag = queue
        .ticket(QueueOrder::FairByTenant, 0, 9, at(0.0))
        .start_tag;
    assert_eq!(start_tag, queue.virtual_time);
}

#[test]
fn the_number_of_remembered_tenants_is_bounded() {
    let mut queue = QueueTickets::default();
    for tenant in 0..3 * MAX_TENANTS as u64 {
        arrive(&mut queue, QueueOrder::FairByTenant, tenant, 1.0, 0.0);
        assert!(queue.tenant_finish_tags.len() <= MAX_TENANTS);
    }
    queue.virtual_time = at(5.0);
    arrive(&mut queue, QueueOrder::FairByTenant, u64::MAX, 1.0, 0.0);
    assert_eq!(queue.tenant_finish_tags.len(), 1);
}

#[test]
fn a_tenant_beyond_the_limit_does_not_overtake_itself_or_others() {
    let mut queue = QueueTickets::default();
    for tenant in 0..MAX_TENANTS as u64 {
        arrive(&mut queue, QueueOrder::FairByTenant, tenant, 1.0, 0.0);
    }
    let mut keys =
        (0..3).map(|_| arrive(&mut queue, QueueOrder::FairByTenant, u64::MAX, 1.0, 0.0).order_tag);
    let tags = [keys.next(), keys.next(), keys.next()];
    assert_eq!(tags, [0.0, 1.0, 2.0].map(|tag| Some(at(tag))));
    // The shared tag has passed once the tenant's requests are served.
    queue.virtual_time = at(5.0);
    let key = arrive(&mut queue, QueueOrder::FairByTenant, u64::MAX, 1.0, 0.0);
    assert_eq!(key.order_tag, at(5.0));
}

#[test]
fn a_limited_number_of_requests_is_considered_for_dispatch() {
    let insert = |queue: &mut WorkerQueue, serial: u64, blocks: u64| {
        let ticket = QueueTickets::default().ticket(
            QueueOrder::ShortestPrefillFirst,
            0,
            0,
            at(serial as f64),
        );
        let booking = BookingId { serial, index: 0 };
        let memory = (blocks, OutputReservation::default());
        queue.insert(
            ticket.queue_key(1.0),
            booking,
            PrefillWork::default(),
            memory,
        );
    };
    for (large_requests, is_found) in [
        (MAX_BACKFILL_CANDIDATES - 1, true),
        (MAX_BACKFILL_CANDIDATES, false),
    ] {
        let mut queue = WorkerQueue::default();
        for serial in 0..large_requests as u64 {
            insert(&mut queue, serial, 50);
        }
        insert(&mut queue, large_requests as u64, 5);
        let next = queue.next_dispatchable(at(0.0), |blocks, _| blocks <= 9);
        let serial = next.map(|(_, booking, _)| booking.serial);
        assert_eq!(serial, is_found.then_some(large_requests as u64));
    }
}

proptest! {
    /// Compares the queue with a sorted list.
    #[test]
    fn totals_before_a_key_equal_those_of_a_sorted_list(
        steps in prop::collection::vec((0..5, 0..9u64, 0..50u32), 1..120)
    ) {
        let mut queue = WorkerQueue::default();
        let mut naive: Vec<(QueueKey, BookingId, PrefillWork)> = Vec::new();
        let mut displaced = Vec::new();
        for (arrival, (step, tag, tokens)) in (0..).zip(steps) {
            let tag = Duration::from_secs(tag);
            let key = QueueKey { priority: tokens as i32 % 2, order_tag: tag, arrival_number: arrival, backfill_until: tag };
            if step == 0 {
                let waiting = naive.iter().rev().find(|(key, ..)| !displaced.contains(key));
                let last = waiting.map(|(key, booking, _)| (*key, *booking));
                prop_assert_eq!(queue.last(), last);
                if let Some((key, _)) = last {
                    queue.displace(key);
                    displaced.push(key);
                }
            } else if step < 4 || naive.is_empty() {
                let booking = BookingId { serial: arrival, index: 0 };
                let work = PrefillWork::new(tokens, tokens);
                queue.insert(key, booking, work, (tokens.into(), OutputReservation::default()));
                naive.push((key, booking, work));
                naive.sort_unstable_by_key(|(key, ..)| *key);
            } else {
                let (removed, _, work) = naive.remove(tokens as usize % naive.len());
                let was_displaced = displaced.contains(&removed);
                let expected = Removed { blocks: work.new_tokens, was_displaced };
                prop_assert_eq!(queue.remove(removed), Some(expected));
                prop_assert_eq!(queue.remove(removed), None);
                displaced.retain(|key| *key != removed);
            }
            let before = |limit: QueueKey| {
                let mut sum = PrefillTotals::default();
                for &(_, _, work) in naive.iter().filter(|(key, ..)| *key < limit) {
                    sum += PrefillTotals { requests: 1, work };
                }
                sum
            };
            prop_assert_eq!(queue.waiting(), naive.len() - displaced.len());
            for (key, ..) in &naive {
                prop_assert_eq!(queue.is_displaced(*key), displaced.contains(key));
            }
            let next = queue.next_dispatchable(Duration::ZERO, |_, _| true);
            let waiting = naive.iter().find(|(key, ..)| !displaced.contains(key));
            let expected = waiting.map(|(key, booking, _)| (*key, *booking, true));
            prop_assert_eq!(next, expected);
            prop_assert_eq!(queue.first(), waiting.map(|(_, booking, _)| *booking));
            prop_assert_eq!(queue.totals_before(key), before(key));
            let last = QueueKey { priority: i32::MAX, ..key };
            prop_assert_eq!(queue.totals(), before(last));
            prop_assert!(queue.bookings().eq(naive.iter().map(|(_, booking, _)| *booking)));
        }
    }
}
