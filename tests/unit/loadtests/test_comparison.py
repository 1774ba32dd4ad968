import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from loadtests.comparing import noise_floor
from loadtests.comparing.comparison import Comparison, compare, compare_run
from loadtests.comparing.figures import METRICS
from loadtests.comparing.noise_floor import measure_floor, read_floors
from loadtests.comparing.rank_statistics import holm, mann_whitney, ratio_interval, student_quantile
from loadtests.comparing.stored_runs import Run
from loadtests.run_record import Calibration, RunRecord
from tests.support.run_records import START, record_of, samples, store

PLAIN = record_of(samples(seconds=20, rate=60), seconds=20, verdict="PASS", reasons=())


def at(seconds: float) -> str:
    """A time so many seconds after the first run's."""
    return record_of([], started_at=START + seconds).started_at


def run_of(number: int, scale: float, *, calibration_seconds: float = 0.25) -> Run:
    """A run whose every latency and cost is *scale* times the plain one's; sides (hundreds) take turns."""
    latency = PLAIN.acknowledged
    changed = {name: getattr(latency, name) * scale for name in ("mean_ms", "p50_ms", "p95_ms", "p99_ms")}
    record = dataclasses.replace(
        PLAIN,
        acknowledged=dataclasses.replace(latency, **changed),
        server=dataclasses.replace(PLAIN.server, cpu_us_per_order=300 * scale),
        orders_per_second=60 / scale,
        calibration=Calibration(calibration_seconds, calibration_seconds),
        started_at=at(240 * (number % 100) + 60 * (number // 100)),
    )
    return Run(f"peak-{number}", record)


def side(
    runs: int, scale: float, *, seed: int, noise: float = 0.05, calibration_seconds: float = 0.25
) -> list[Run]:
    """Runs of one build on a machine that repeats itself to within *noise*."""
    chance = random.Random(seed)  # noqa: S311 - repeatable, not secret
    return [
        run_of(
            seed * 100 + n, scale * math.exp(chance.gauss(0, noise)), calibration_seconds=calibration_seconds
        )
        for n in range(runs)
    ]


def claims(compared: Comparison) -> set[str]:
    return {row.claim for row in compared.rows}


class TestRankTest:
    @pytest.mark.parametrize(
        ("first", "second", "p"),
        [
            # The example of SciPy's documentation of mannwhitneyu: U = 17, exact.
            ([19, 22, 16, 29, 24], [20, 11, 17, 12], 0.1111111111111111),
            ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10], 2 / 252),
            ([1, 2, 3], [4, 5, 6], 2 / 20),
            ([1, 1, 1], [1, 1, 1], 1.0),
        ],
        ids=["scipy", "five apart", "three apart", "all tied"],
    )
    def test_published_p_values(self, first: list[float], second: list[float], p: float) -> None:
        assert mann_whitney(first, second) == pytest.approx(p, abs=1e-12)
        assert mann_whitney(second, first) == pytest.approx(p, abs=1e-12)

    @pytest.mark.parametrize(
        ("n", "m", "critical"),
        [(5, 5, 2), (5, 8, 6), (8, 8, 13), (10, 10, 23), (12, 15, 49), (20, 20, 127)],
    )
    def test_published_critical_values(self, n: int, m: int, critical: int) -> None:
        """The table of critical U at 5 %, two-sided: at U it is rejected, at U + 1 it is not."""

        def with_u(u: int) -> tuple[list[float], list[float]]:
            # `second` is 1..m apart from gaps; each of `first` is placed above a number of them that adds up to u.
            full, rest = divmod(u, m)
            above = [m] * full + ([rest] if full < n else []) + [0] * (n - full - 1)
            return [count + 0.5 for count in above], [float(i + 1) for i in range(m)]

        def untied(u: int) -> float:
            first, second = with_u(u)
            return mann_whitney([value + i * 1e-6 for i, value in enumerate(sorted(first))], second)

        assert untied(critical) <= 0.05 < untied(critical + 1)

    def test_ties_equal_a_count_of_all_permutations(self) -> None:
        first, second = [1.0, 2, 2, 5], [2.0, 3, 5, 5, 6]
        everything = [*first, *second]

        def rank_sum(values: Sequence[float]) -> float:
            return sum(sum(o < v for o in everything) + (everything.count(v) + 1) / 2 for v in values)

        middle = len(first) * (len(everything) + 1) / 2
        seen = abs(rank_sum(first) - middle)
        splits = [abs(rank_sum(chosen) - middle) for chosen in itertools.combinations(everything, len(first))]
        assert mann_whitney(first, second) == pytest.approx(
            sum(s >= seen - 1e-9 for s in splits) / len(splits)
        )

    def test_interval_leaves_out_one_exactly_where_the_test_rejects(self) -> None:
        chance = random.Random(3)  # noqa: S311 - repeatable, not secret
        for _ in range(200):
            first = [math.exp(chance.gauss(0, 0.1)) for _ in range(5)]
            second = [math.exp(chance.gauss(0.1, 0.1)) for _ in range(6)]
            interval = ratio_interval(first, second)
            assert interval
            low, estimate, high = interval
            assert low <= estimate <= high
            assert (low <= 1 <= high) == (mann_whitney(first, second) > 0.05)

    def test_interval_holds_its_confidence(self) -> None:
        """Of 2,000 pairs of sides with a true ratio of 1.2, at least 95 % have it in their interval."""
        chance = random.Random(4)  # noqa: S311 - as above
        held = 0
        for _ in range(2000):
            first = [math.exp(chance.gauss(0, 0.1)) for _ in range(5)]
            second = [1.2 * math.exp(chance.gauss(0, 0.1)) for _ in range(5)]
            interval = ratio_interval(first, second)
            held += interval is not None and interval[0] <= 1.2 <= interval[2]
        assert held / 2000 >= 0.95

    def test_too_few_runs_have_no_interval(self) -> None:
        assert ratio_interval([1.0, 2.0], [3.0, 4.0]) is None

    def test_holm(self) -> None:
        assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])

    @pytest.mark.parametrize(
        ("probability", "degrees", "value"),
        [
            (0.975, 4, 2.776445),
            (0.975, 9, 2.262157),
            (0.995, 10, 3.169273),
            (0.975, 1, 12.706205),
            (0.95, 30, 1.697261),
        ],
    )
    def test_students_table(self, probability: float, degrees: int, value: float) -> None:
        assert student_quantile(probability, degrees) == pytest.approx(value, abs=1e-5)


class TestClaims:
    def test_same_build_shows_no_difference(self) -> None:
        """Of a hundred A/A comparisons of five runs a side no more than the 5 % claim anything."""
        claimed = sum(
            bool(claims(compare(side(5, 1, seed=2 * n), side(5, 1, seed=2 * n + 1))) & {"better", "worse"})
            for n in range(100)
        )
        assert claimed <= 5
        compared = compare(side(5, 1, seed=1), side(5, 1, seed=2))
        assert compared.conclusion == "No difference that these runs can show."

    def test_one_metric_that_barely_differs_is_not_claimed_among_six(self) -> None:
        """p = 4/252 would do alone; looking at six figures, one such is to be expected."""

        def with_p99(number: int, p99_ms: float) -> Run:
            record = run_of(number, 1).record
            return Run(
                f"peak-{number}",
                dataclasses.replace(
                    record, acknowledged=dataclasses.replace(record.acknowledged, p99_ms=p99_ms)
                ),
            )

        before = [with_p99(n, p99_ms) for n, p99_ms in enumerate((10, 11, 12, 13, 15))]
        after = [with_p99(n, p99_ms) for n, p99_ms in enumerate((14, 16, 17, 18, 19))]
        row = next(row for row in compare(before, after).rows if row.name == "p99_ms")
        assert row.p == pytest.approx(6 * 4 / 252)
        assert row.claim == "no difference"

    def test_thirty_percent_slower_is_found(self) -> None:
        compared = compare(side(5, 1, seed=1), side(5, 1.3, seed=2))
        assert claims(compared) == {"worse"}
        assert compared.method == "rank test"
        assert "Beyond the noise" in compared.conclusion

    def test_faster_is_better_and_fewer_orders_are_worse(self) -> None:
        assert claims(compare(side(5, 1.3, seed=1), side(5, 1, seed=2))) == {"better"}

    def test_six_complete_separations_survive_the_correction(self) -> None:
        """2 / 252 times the number of metrics is below 5 %, and it would not be with one metric more."""
        assert 2 / 252 * len(METRICS) < 0.05 < 2 / 252 * (len(METRICS) + 1)

    def test_four_runs_claim_nothing_without_a_floor(self) -> None:
        compared = compare(side(4, 1, seed=1), side(4, 3, seed=2))
        assert claims(compared) == {"cannot tell"}
        assert "RUNS=5" in compared.conclusion

    def test_single_runs_are_held_against_the_floor(self) -> None:
        """With 2 % noise one run of each build tells 30 % from nothing, and does not tell 2 % from it."""
        floor = measure_floor([run.record for run in side(10, 1, seed=1, noise=0.02)])
        assert floor
        worse = compare([run_of(1, 1)], [run_of(2, 1.3)], [floor])
        assert (worse.method, claims(worse)) == ("noise floor", {"worse"})
        same = compare([run_of(1, 1)], [run_of(2, 1.02)], [floor])
        assert claims(same) == {"no difference"}

    def test_floor_errs_no_more_often_than_it_says(self) -> None:
        """Of 300 pairs of single runs of one build, each with a floor of its own, at most 5 % claim a difference."""
        claimed = 0
        for n in range(300):
            floor = measure_floor([run.record for run in side(5, 1, seed=3 * n)])
            assert floor
            pair = side(1, 1, seed=3 * n + 1), side(1, 1, seed=3 * n + 2)
            claimed += bool(claims(compare(*pair, [floor])) & {"better", "worse"})
        assert claimed <= 15

    def test_floor_of_another_machine_or_load_is_not_used(self) -> None:
        floor = measure_floor([run.record for run in side(5, 1, seed=1)])
        assert floor
        for other in (
            dataclasses.replace(floor, machine={**floor.machine, "cores": "64"}),
            dataclasses.replace(floor, load={**floor.load, "users": "7"}),
        ):
            assert compare([run_of(1, 1)], [run_of(2, 9)], [other]).method == "none"

    def test_what_the_machine_did_itself_is_not_claimed(self) -> None:
        """Where the calibration work took 40 % longer too, 30 % slower orders are nobody's fault."""
        compared = compare(side(5, 1, seed=1), side(5, 1.3, seed=2, calibration_seconds=0.35))
        assert compared.drift == pytest.approx(1.4)
        assert claims(compared) == {"cannot tell"}

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"verdict": "INVALID"}, "peak-2 is INVALID"),
            ({"complete": False}, "peak-2 was ended before its time"),
            ({"users": 50}, "not the same load: users 500 and 50"),
        ],
        ids=["invalid", "incomplete", "other load"],
    )
    def test_runs_that_cannot_be_compared(self, changes: dict[str, object], reason: str) -> None:
        other = Run("peak-2", dataclasses.replace(run_of(2, 9).record, **changes))  # type: ignore[arg-type]
        compared = compare([run_of(1, 1)], [other])
        assert reason in compared.conclusion
        assert claims(compared) == {"cannot tell"}

    def test_sides_that_did_not_take_turns(self) -> None:
        """All of one side before all of the other: what changed may be the hour, however much it is."""
        first, second = side(5, 1, seed=1), side(5, 1.6, seed=2)
        assert claims(compare(first, second)) == {"worse"}
        later = [
            Run(run.name, dataclasses.replace(run.record, started_at=at(3600 + 60 * place)))
            for place, run in enumerate(second)
        ]
        compared = compare(first, later)
        assert claims(compared) == {"cannot tell"}
        assert "did not take turns" in compared.conclusion
        assert all(
            row.ratio > 1.3 for row in compared.rows if row.name != "orders_per_second"
        )  # with the figures

    def test_what_else_differs_is_named(self) -> None:
        before, after = run_of(1, 1), run_of(2, 1)
        environment = dataclasses.replace(
            after.record.environment, database={"max_connections": "120", "fsync": "off"}
        )
        after = Run("peak-2", dataclasses.replace(after.record, environment=environment))
        assert compare([before], [after]).changed == (("database setting fsync", "on", "off"),)


class TestSides:
    def stored(self, results: Path, number: int, scale: float, **changes: object) -> tuple[Path, RunRecord]:
        """A run that began *number* hours after the first."""
        at = record_of([], started_at=START + 3600 * number).started_at
        record = dataclasses.replace(run_of(number, scale).record, started_at=at, **changes)  # type: ignore[arg-type]
        return store(results / f"peak-{number}", record), record

    def test_first_run_has_nothing_to_be_compared_with(self, tmp_path: Path) -> None:
        directory, record = self.stored(tmp_path, 1, 1)
        assert compare_run(record, directory) is None

    def test_last_run_of_the_same_load_is_the_baseline(self, tmp_path: Path) -> None:
        """Neither an INVALID run, nor one of another load, nor one that came later."""
        self.stored(tmp_path, 1, 1)
        self.stored(tmp_path, 2, 1)
        self.stored(tmp_path, 3, 1, verdict="INVALID")
        self.stored(tmp_path, 4, 1, users=7)
        directory, record = self.stored(tmp_path, 5, 1)
        self.stored(tmp_path, 6, 1)
        compared = compare_run(record, directory)
        assert compared
        assert compared.baseline == ("peak-2",)

    def test_runs_made_in_one_go_are_one_side(self, tmp_path: Path) -> None:
        """RUNS=5 twice: the second five are held against the first five, which became the noise floor."""
        for first, scale in ((1, 1.0), (11, 1.3)):
            earlier: list[Path] = []
            for number in range(first, first + 5):
                directory, record = self.stored(tmp_path, number, scale * (1 + 0.01 * (number % 5)))
                compared = compare_run(record, directory, earlier=earlier)
                earlier.append(directory)
        assert compared
        assert compared.baseline == tuple(f"peak-{n}" for n in range(1, 6))
        assert compared.candidate == tuple(f"peak-{n}" for n in range(11, 16))
        assert (compared.method, claims(compared)) == ("none", {"cannot tell"})  # ten hours lie between
        assert "did not take turns" in compared.conclusion
        (floor,) = read_floors(tmp_path)
        assert floor.runs == 5

    def test_baseline_by_name_and_by_path(self, tmp_path: Path) -> None:
        first, _ = self.stored(tmp_path, 1, 1)
        self.stored(tmp_path, 2, 1)
        directory, record = self.stored(tmp_path, 3, 1)
        for name in ("peak-1", first, first / "report.json"):
            compared = compare_run(record, directory, baseline=name)
            assert compared
            assert compared.baseline == ("peak-1",)
        with pytest.raises(FileNotFoundError, match="BASELINE=peak-9"):
            compare_run(record, directory, baseline="peak-9")

    def test_a_damaged_floor_file_counts_as_none(self, tmp_path: Path) -> None:
        (tmp_path / noise_floor.FLOOR_FILE).write_text("[{]")
        assert read_floors(tmp_path) == ()
