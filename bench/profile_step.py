"""Where the time of a step goes: phases and operators, as published and ours.

    python -m bench.profile_step [--size vits16-224-b8] [--variants eager,auto] [--steps 2]

Times of operators are those of torch.profiler (self time, on the GPU where there is one); they
include its overhead, so read them as shares. Phases are timed without it.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.measure import peak_bytes
from bench.step_race import PHASES, Race
from bench.step_sizes import VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_step", description=__doc__)
    parser.add_argument("--size", default="vits16-224-b8")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--variants", default="eager,auto", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--top", type=int, default=10, help="operators shown")
    args = parser.parse_args()
    names = args.variants.split(",")
    unknown = [name for name in names if name not in VARIANTS]
    if unknown or args.steps < 1:
        parser.error(f"unknown variants {unknown}, or --steps {args.steps} < 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    race = Race(args.size, device, rounds=1, warmup=1, phase_steps=args.steps, only=names)
    print(phase_table(race))
    print(f"\npeak memory of a step, above what it keeps\n\n{memory_table(race)}")
    for name in names:
        print(f"\n{name}: operators by self time\n\n{operator_table(race, name, args)}")


def phase_table(race: Race) -> str:
    """Milliseconds of each phase and its share of the step, a column pair a variant."""
    head = ["phase", *(cell for name in race.phases for cell in (f"{name} ms", "%"))]
    totals = {n: sum(ms for p, ms in t.items() if p != "data") for n, t in race.phases.items()}
    rows = []
    for phase in PHASES:
        cells = [phase]
        for name, times in race.phases.items():
            share = "" if phase == "data" else f"{100 * times[phase] / totals[name]:.1f}"
            cells += [f"{times[phase]:.2f}", share]
        rows.append(cells)
    rows.append(["step", *(c for total in totals.values() for c in (f"{total:.2f}", "100.0"))])
    return markdown(head, rows)


def memory_table(race: Race) -> str:
    """Most memory held at a time during a step (gradients included, weights not), and its ratio."""
    inputs = race.inputs(0, race.images)
    peaks = {
        name: peak_bytes(partial(runner.step, inputs), race.device)
        for name, runner in race.runners.items()
    }
    first = next(iter(peaks.values()))
    rows = [[n, f"{peak / 2**20:.0f}", f"{peak / first:.2f}"] for n, peak in peaks.items()]
    return markdown(["step", "MiB", f"of {next(iter(peaks))}"], rows)


def operator_table(race: Race, name: str, args: argparse.Namespace) -> str:
    """The operators with the largest self time, with calls a step and share."""
    cuda = race.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=activities) as profiler:
        for number in range(args.steps):
            race.runners[name].step(race.inputs(number, race.images))
        if cuda:
            torch.cuda.synchronize()

    def own(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total)

    events = sorted(profiler.key_averages(), key=own, reverse=True)
    total = sum(own(event) for event in events)
    rows = [
        [f"`{e.key[:60]}`", f"{e.count / args.steps:g}", f"{own(e) / args.steps / 1e3:.2f}",
         f"{100 * own(e) / total:.1f}"]
        for e in events[: args.top]
    ]  # fmt: skip
    rest = sum(own(event) for event in events[args.top :])
    rows.append(["others", "", f"{rest / args.steps / 1e3:.2f}", f"{100 * rest / total:.1f}"])
    return markdown(["operator", "calls", "ms", "%"], rows)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
