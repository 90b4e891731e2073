from pipeline.cluster.task_queue import MAX_MARKED_CRASHES, TaskQueue


def take(queue: TaskQueue, in_flight: set[int], num_others_free: int = 0) -> int | None:
    task = queue.next_for(in_flight, num_others_free)
    if task is not None:
        in_flight.add(task)
    return task


def test_a_worker_is_filled_up_in_order_but_not_with_what_free_workers_could_take() -> None:
    queue = TaskQueue([4, 5, 6], max_attempts=3, tasks_per_worker=2)
    first, second = set[int](), set[int]()
    assert take(queue, first) == 4
    assert take(queue, first, num_others_free=2) is None
    assert take(queue, first, num_others_free=1) == 5
    assert take(queue, first) is None, "it has two"
    assert take(queue, second) == 6
    assert (queue.num_waiting, queue.num_unfinished) == (0, 3)
    for task in (4, 5, 6):
        queue.done(task)
    assert queue.num_unfinished == 0


def test_a_death_beside_other_tasks_counts_against_no_task_and_each_is_run_alone_after_the_others() -> None:
    queue = TaskQueue([1, 2, 3], max_attempts=1, tasks_per_worker=2)
    worker = set[int]()
    take(queue, worker), take(queue, worker)
    queue.worker_died(sorted(worker), "n", 7, "killed")
    assert queue.given_up == {}
    assert not any(failed.counts for tries in queue.tries.values() for failed in tries)
    fresh = set[int]()
    assert take(queue, fresh) == 3
    assert take(queue, fresh) is None, "a suspect has no company"
    queue.done(3)
    alone = set[int]()
    assert take(queue, alone) == 1
    assert take(queue, alone) is None, "a suspect has no company"
    queue.worker_died([1], "n", 8, "killed again")
    assert queue.given_up == {1: "killed again (after 1 attempts)"}
    assert take(queue, set()) == 2
    queue.done(2)
    assert queue.num_unfinished == 0


def test_a_failed_task_waits_behind_the_others_and_a_given_up_one_does_not_come_back() -> None:
    queue = TaskQueue([1, 2], max_attempts=2, tasks_per_worker=1)
    assert take(queue, set()) == 1
    queue.failed(1, "n", 7, "bad")
    assert take(queue, set()) == 2
    queue.done(2)
    assert take(queue, set()) == 1
    queue.failed(1, "m", 8, "worse")
    assert take(queue, set()) is None
    assert queue.num_unfinished == 0
    assert queue.given_up == {1: "worse (after 2 attempts)"}
    assert [(failed.node, failed.pid, failed.why) for failed in queue.tries[1]] == [("n", 7, "bad"), ("m", 8, "worse")]


def test_what_waits_when_no_worker_can_start_is_given_up_with_the_reason() -> None:
    queue = TaskQueue([1, 2], max_attempts=2, tasks_per_worker=1)
    queue.give_up_waiting("no worker could start")
    assert queue.num_unfinished == 0
    assert queue.given_up.keys() == {1, 2}


def test_the_last_of_several_attempts_is_a_isolated_one_alone_in_its_worker() -> None:
    queue = TaskQueue([1, 2], max_attempts=2, tasks_per_worker=2)
    assert not queue.is_last(1)
    worker = set[int]()
    take(queue, worker)
    queue.failed(1, "n", 7, "bad")
    assert queue.is_last(1)
    assert take(queue, set()) == 2
    isolated = set[int]()
    assert take(queue, isolated) == 1
    assert take(queue, isolated) is None
    assert not TaskQueue([1], max_attempts=1, tasks_per_worker=2).is_last(1)


def test_a_crash_at_a_marked_position_is_no_attempt_until_the_position_is_proven_to_kill() -> None:
    queue = TaskQueue([1], max_attempts=2, tasks_per_worker=2)
    take(queue, set())
    queue.failed(1, "n", 7, "bad")
    for position in (5, 5, 3, 3):
        assert queue.is_last(1)
        take(queue, set())
        queue.worker_died([1], "n", 8, "killed", position)
    assert queue.crashes(1) == (5, 5, 3, 3)
    assert queue.given_up == {}
    take(queue, set())
    queue.worker_died([1], "n", 9, "killed", 5)
    assert queue.given_up == {1: "killed (after 2 attempts)"}, "the try that was told of the position went there again"


def test_crashes_at_marked_positions_are_bounded_however_many_positions_there_are() -> None:
    queue = TaskQueue([1], max_attempts=2, tasks_per_worker=1)
    take(queue, set())
    queue.failed(1, "n", 7, "bad")
    num_crashes = 0
    while queue.num_unfinished:
        take(queue, set())
        queue.worker_died([1], "n", 8, "killed", num_crashes)
        num_crashes += 1
    assert num_crashes == MAX_MARKED_CRASHES + 1
