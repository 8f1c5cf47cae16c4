"""What an accelerator gives: the one command for a machine that has one.

    python benchmarks/accelerator.py [--minutes 9] [--out accelerator] [--only decode-8b trace …] [--tiny]

It checks and measures within a budget of time, most important first, and needs the checkout and the project's
dependencies alone. Each stage runs in processes of its own, so none takes another with it. results.md and results.json
in the folder are written anew after every measurement; beside them, in stages/, is what each process told and printed.
On a CPU, where kernels are interpreted, shapes are tiny and figures say nothing. Exits with 1 where a check failed or a
measurement ended in an error.
"""

import argparse
import shutil
import signal
import sys
from pathlib import Path

from accelerator_stages.all_stages import STAGES
from accelerator_stages.measurement import Settings
from accelerator_stages.report import gather, new_heading
from accelerator_stages.supervise import run_all


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--out", type=Path, default=Path("accelerator"), help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], metavar="STAGE")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on an accelerator too")
    parser.add_argument("--torch-python", default=sys.executable, help="an interpreter with torch and transformers")
    return parser.parse_args()


def main() -> int:
    given = arguments()
    settings = Settings(given.tiny, given.torch_python, str(given.out.resolve()))
    shutil.rmtree(given.out / "stages", ignore_errors=True)
    (given.out / "stages").mkdir(parents=True)
    stages = [stage for stage in STAGES if not given.only or stage.name in given.only]
    heading = new_heading(settings, given.minutes)

    def looked(seconds: dict[str, float]) -> None:
        gather(stages, settings, heading, seconds).write(given.out)

    seconds = run_all(stages, settings, given.minutes * 60, looked)
    report = gather(stages, settings, heading, seconds)
    report.write(given.out)
    print(f"{given.out / 'results.md'}: {report.verdict}")
    return 1 if report.failed or report.broken else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the stage's process ends too
    sys.exit(main())
