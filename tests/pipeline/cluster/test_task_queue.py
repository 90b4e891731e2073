from pipeline.cluster.task_queue import MOST_DEATHS_AT_PLACES, TaskQueue


def take(pool: TaskQueue, in_flight: set[int], num_others_free: int = 0) -> int | None:
    task = pool.next_for(in_flight, num_others_free)
    if task is not None:
        in_flight.add(task)
    return task


def test_a_worker_is_filled_up_in_order_but_not_with_what_free_workers_could_take() -> None:
    pool = TaskQueue([4, 5, 6], max_attempts=3, tasks_per_worker=2)
    first, second = set[int](), set[int]()
    assert take(pool, first) == 4
    assert take(pool, first, num_others_free=2) is None
    assert take(pool, first, num_others_free=1) == 5
    assert take(pool, first) is None, "it has two"
    assert take(pool, second) == 6
    assert (pool.num_waiting, pool.num_unfinished) == (0, 3)
    for task in (4, 5, 6):
        pool.done(task)
    assert pool.num_unfinished == 0


def test_a_death_in_company_counts_against_no_task_and_each_is_run_alone_after_the_others() -> None:
    pool = TaskQueue([1, 2, 3], max_attempts=1, tasks_per_worker=2)
    worker = set[int]()
    take(pool, worker), take(pool, worker)
    pool.worker_died(sorted(worker), "n", 7, "killed")
    assert pool.given_up == {}
    assert not any(failed.counts for tries in pool.tries.values() for failed in tries)
    fresh = set[int]()
    assert take(pool, fresh) == 3
    assert take(pool, fresh) is None, "a suspect has no company"
    pool.done(3)
    alone = set[int]()
    assert take(pool, alone) == 1
    assert take(pool, alone) is None, "a suspect has no company"
    pool.worker_died([1], "n", 8, "killed again")
    assert pool.given_up == {1: "killed again (after 1 attempts)"}
    assert take(pool, set()) == 2
    pool.done(2)
    assert pool.num_unfinished == 0


def test_a_failed_task_waits_behind_the_others_and_a_given_up_one_does_not_come_back() -> None:
    pool = TaskQueue([1, 2], max_attempts=2, tasks_per_worker=1)
    assert take(pool, set()) == 1
    pool.failed(1, "n", 7, "bad")
    assert take(pool, set()) == 2
    pool.done(2)
    assert take(pool, set()) == 1
    pool.failed(1, "m", 8, "worse")
    assert take(pool, set()) is None
    assert pool.num_unfinished == 0
    assert pool.given_up == {1: "worse (after 2 attempts)"}
    assert [(failed.node, failed.pid, failed.why) for failed in pool.tries[1]] == [("n", 7, "bad"), ("m", 8, "worse")]


def test_what_waits_when_no_worker_can_start_is_given_up_with_the_reason() -> None:
    pool = TaskQueue([1, 2], max_attempts=2, tasks_per_worker=1)
    pool.give_up_waiting("no worker could start")
    assert pool.num_unfinished == 0
    assert pool.given_up.keys() == {1, 2}


def test_the_last_of_several_attempts_is_a_careful_one_alone_in_its_worker() -> None:
    pool = TaskQueue([1, 2], max_attempts=2, tasks_per_worker=2)
    assert not pool.is_last(1)
    worker = set[int]()
    take(pool, worker)
    pool.failed(1, "n", 7, "bad")
    assert pool.is_last(1)
    assert take(pool, set()) == 2
    careful = set[int]()
    assert take(pool, careful) == 1
    assert take(pool, careful) is None
    assert not TaskQueue([1], max_attempts=1, tasks_per_worker=2).is_last(1)


def test_a_death_at_a_known_place_is_no_attempt_until_the_place_is_proven_to_kill() -> None:
    pool = TaskQueue([1], max_attempts=2, tasks_per_worker=2)
    take(pool, set())
    pool.failed(1, "n", 7, "bad")
    for place in (5, 5, 3, 3):
        assert pool.is_last(1)
        take(pool, set())
        pool.worker_died([1], "n", 8, "killed", place)
    assert pool.deaths(1) == (5, 5, 3, 3)
    assert pool.given_up == {}
    take(pool, set())
    pool.worker_died([1], "n", 9, "killed", 5)
    assert pool.given_up == {1: "killed (after 2 attempts)"}, "who was told of the place went there again"


def test_deaths_at_places_are_bounded_however_many_places_there_are() -> None:
    pool = TaskQueue([1], max_attempts=2, tasks_per_worker=1)
    take(pool, set())
    pool.failed(1, "n", 7, "bad")
    num_deaths = 0
    while pool.num_unfinished:
        take(pool, set())
        pool.worker_died([1], "n", 8, "killed", num_deaths)
        num_deaths += 1
    assert num_deaths == MOST_DEATHS_AT_PLACES + 1
