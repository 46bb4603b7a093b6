"""Train the demo checkpoint, a small Gemma 4 mixture of experts, on two CPU cores.

The parts are in `demo_model/`. Set OMP_WAIT_POLICY=PASSIVE and GOMP_SPINCOUNT=0 when the cores do
other work too: threads that spin make a step far slower.

    python scripts/train_demo.py --minutes 75             # about 75 minutes on two cores
    python scripts/train_demo.py --minutes 75 --resume    # goes on after an interruption
    python scripts/train_demo.py --eval-only              # measures the exported checkpoint again
"""

from __future__ import annotations

import argparse
from pathlib import Path

from demo_model.batches import Batches
from demo_model.card import write_card
from demo_model.export import export
from demo_model.fast_layers import use_fast_layers
from demo_model.model import new_model
from demo_model.optimizers import make_optimizers
from demo_model.tokenizer import train_tokenizer
from demo_model.training import Run, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--minutes", type=float, default=75.0, help="training time over all resumed runs"
    )
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--resume", action="store_true", help="go on from the last state in --work")
    parser.add_argument("--out", type=Path, default=Path("demo/gemma4-moe-demo"))
    parser.add_argument(
        "--work", type=Path, default=Path(".train"), help="where the training state is kept"
    )
    parser.add_argument(
        "--stock-layers",
        action="store_true",
        help="train with the modules of transformers: half as fast, needs no C++ compiler",
    )
    parser.add_argument("--note", default="", help="a sentence on this run for the model card")
    parser.add_argument(
        "--eval-only", action="store_true", help="measure --out again and rewrite its card"
    )
    args = parser.parse_args()
    if not args.eval_only:
        train_and_export(args)
    write_card(args.out)


def train_and_export(args: argparse.Namespace) -> None:
    model = new_model(args.seed)
    model.set_experts_implementation("grouped_mm")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    run = Run(
        model,
        make_optimizers(model),
        Batches(train_tokenizer(), args.seed),
        args.work,
        args.seed,
        args.note,
    )
    if args.resume:
        run.load()
    if not args.stock_layers:
        use_fast_layers(model)
    train(run, args.minutes)
    if run.seconds < args.minutes * 60:
        raise SystemExit("stopped before the end: go on with --resume")
    export(run, args.out)


if __name__ == "__main__":
    main()
