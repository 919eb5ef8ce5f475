"""The published figures that can be checked, one `Figure` each, in the order that `reproduce list` shows them.

To add one, write its number as it is printed, the address where it is printed, and the command that measures it.
"""

from collections.abc import Iterator

from bit_jax.plan.request import Request as PlanRequest
from bit_jax.reproductions.records import Figure, Source, Value
from bit_jax.training.flagperf import epoch_steps

TIMM = Source(
    "timm, results/results-imagenet.csv of 2026-08-08 (aa4b585)",
    "https://github.com/huggingface/pytorch-image-models/blob/"
    "aa4b5850c1543fa488abf260f18390eda46cf85d/results/results-imagenet.csv",
)
AUTHORS = Source(
    "README of google-research/big_transfer (140de6e)",
    "https://github.com/google-research/big_transfer/blob/140de6e704fd8d61f3e5ea20ffde130b7d5fd065/README.md",
)
DISTILLED = Source(
    "README of big_vision's distillation (2f3f493), after Beyer et al., arXiv:2106.05237",
    "https://github.com/google-research/big_vision/blob/"
    "2f3f493af048dbfd97555ff6060f31a0e686f17f/big_vision/configs/proj/distill/README.md",
)
FLAGPERF = Source(
    "FlagPerf, README of bigtransfer-pytorch (1b5a030)",
    "https://github.com/FlagOpen/FlagPerf/blob/1b5a030/training/nvidia/bigtransfer-pytorch/README.md",
)
EMBEDDED = Source("result.json of the embedded model", "bit_jax/assets/fashion-mnist-R14x0.5/result.json")
README = Source("README of this project", "README.md")

IMAGENET_TRAIN_EXAMPLES = 1_281_167
IMAGENET_EXAMPLES, CIFAR_EXAMPLES, DIGITS_EXAMPLES, FASHION_EXAMPLES = 50_000, 10_000, 359, 10_000
RANK_0_EXAMPLES = IMAGENET_EXAMPLES // 8  # FlagPerf's accuracy is of the share that one of eight processes evaluates

IMAGENET_DATA = (
    "ImageNet's two archives come from https://image-net.org/download-images, `python -m input_pipeline prepare "
    "imagenet2012 --manual-dir ARCHIVES --data-dir DATA` prepares them once, and `-- --dataset folder:PATH` reads a "
    "folder of images instead"
)
CIFAR_DATA = "`python -m input_pipeline prepare {name} --data-dir DATA` fetches {title} (170 MB) and prepares it, once"
DIGITS_DATA = "the digits come with scikit-learn"
FASHION_DATA = (
    "the four files of https://github.com/zalandoresearch/fashion-mnist belong in DATA/fashion-mnist, as they are"
)

SAME_IMAGES = (
    "The published figure is of the same images, so the two samples are paired and the interval is wider than it would "
    "have to be."
)
TIMMS_EPSILON = "timm standardizes weights with 1e-8 where BiT has 1e-10, which moves logits by about 2e-6."
TIMM_RERUNS = (
    "timm's own table has changed by up to 0.042 points for these files from version to version, with the machine and "
    "the libraries that it was measured with."
)
ONE_RUN = "The interval is that of the test images alone; another seed moves the accuracy, too."
THEIR_FLIP = "The authors' JAX code mirrors every training image instead of half of them."
THEIR_LAST_BATCH = "The authors' JAX code leaves the last partial batch of the test images out."
AT_LEAST_FIVE = (
    "The published range is that of at least five runs; here seeds 0 to 4 draw the examples, and the verdict is on the "
    "median of the five."
)
ONE_SHARE = (
    "FlagPerf's accuracy is of rank 0's share, 6,250 of the 50,000 images: {printed} times 6,250 is the whole number "
    "{count}. The interval is for that many; `-- --flagperf-compat accuracy` measures that share, too."
)
TF32 = (
    "The published `fp32` is TF32: {rate} images/s on {cards} would be {flops:.0f} TFLOP/s a card, above the 19.5 that "
    "an A100 has in float32. Therefore the command has --precision tf32."
)
P_CORE = "FlagPerf reads the clock of p_core without waiting for the GPU."
MEMORY = "The published memory is what nvidia-smi shows, reserved memory included; here it is the peak in use."
SPEED = "Times and images/s can only be compared on the same hardware: A100-SXM4-40GB."


def _timm() -> Iterator[Figure]:
    rows = [
        # file, size, acc1, acc5, crop_pct, interpolation
        ("BiT-M-R50x1-ILSVRC2012", 448, "80.386", "95.694", "1", "bilinear"),
        ("BiT-M-R101x1-ILSVRC2012", 448, "82.332", "96.524", "1", "bilinear"),
        ("BiT-M-R50x3-ILSVRC2012", 448, "83.982", "97.130", "1", "bilinear"),
        ("BiT-M-R101x3-ILSVRC2012", 448, "84.430", "97.380", "1", "bilinear"),
        ("BiT-M-R152x2-ILSVRC2012", 448, "84.468", "97.432", "1", "bilinear"),
        ("BiT-M-R152x4-ILSVRC2012", 480, "84.936", "97.456", "1", "bilinear"),
        ("R50x1_224", 224, "82.820", "96.526", "0.875", "bicubic"),
        ("R152x2_T_224", 224, "82.918", "96.568", "0.875", "bicubic"),
        ("R152x2_T_384", 384, "83.858", "97.130", "1", "bicubic"),
    ]
    for file, size, acc1, acc5, share, interpolation in rows:
        yield Figure(
            name=f"timm-{file}",
            what=f"{file} on ImageNet-1k's validation images at {size}x{size}, timm's view ({interpolation}, {share})",
            values=tuple(
                Value(metric, printed, examples=IMAGENET_EXAMPLES)
                for metric, printed in (("acc1", acc1), ("acc5", acc5))
            ),
            source=TIMM,
            how="evaluation",
            words=f"--weights {file} --dataset imagenet2012 --split validation --resize timm --size {size} "
            f"--crop-pct {share} --interpolation {interpolation}",
            examples=IMAGENET_EXAMPLES,
            data=IMAGENET_DATA,
            reasons=(SAME_IMAGES, TIMMS_EPSILON, TIMM_RERUNS),
        )


def _distilled() -> Iterator[Figure]:
    central = "--resize timm --crop-pct 0.875"
    resized = "big_vision resizes the shorter side by area averaging, and here it is antialiased bilinear."
    unsaid = "How the images were resized for this figure is not published; "
    rows = [
        ("R50x1_224", 224, "82.8", central, resized),
        ("R50x1_160", 160, "80.5", central, f"{unsaid}the command has the same share of the image as at 224."),
        ("R152x2_T_224", 224, "83.0", central, resized),
        (
            "R152x2_T_384",
            384,
            "84.3",
            "--resize tf",
            f"{unsaid}the command resizes to the square as BiT does, and timm has 83.858 on its own view.",
        ),
    ]
    for file, size, acc1, view, reason in rows:
        yield Figure(
            name=f"authors-{file}",
            what=f"distill/{file} on ImageNet-1k's validation images at {size}x{size}",
            values=(Value("acc1", acc1, examples=IMAGENET_EXAMPLES),),
            source=DISTILLED,
            how="evaluation",
            words=f"--weights {file} --dataset imagenet2012 --split validation --size {size} {view}",
            examples=IMAGENET_EXAMPLES,
            data=IMAGENET_DATA,
            reasons=(SAME_IMAGES, reason),
        )


def _imagenet() -> Iterator[Figure]:
    for architecture, acc1 in (("R50x1", "80.68"), ("R152x2", "85.15")):
        yield Figure(
            name=f"authors-imagenet-{architecture}",
            what=f"BiT-M-{architecture} fine-tuned on ImageNet-1k by BiT-HyperRule: batch 512, 20,000 steps, 480x480",
            values=(Value("final_acc1", acc1, examples=IMAGENET_EXAMPLES),),
            source=AUTHORS,
            how="training",
            words=f"hyperrule --model BiT-M-{architecture} --dataset imagenet2012 --eval-split validation",
            examples=IMAGENET_EXAMPLES,
            data=IMAGENET_DATA,
            reasons=(ONE_RUN, "The published figure is of one of the authors' test runs in PyTorch."),
            steps=20_000,
            plan=PlanRequest(model=f"BiT-M-{architecture}", devices=8, batch_per_device=64, microbatches=4),
        )


def _cifar() -> Iterator[Figure]:
    full = {  # {(architecture, classes): accuracy of the JAX code}
        ("R50x1", 10): "97.3",
        ("R50x1", 100): "86.4",
        ("R101x3", 10): "98.4",
        ("R101x3", 100): "91.2",
        ("R152x2", 10): "98.5",
        ("R152x2", 100): "91.2",
    }
    few = {  # {(architecture, classes, examples a class): smallest, median and largest accuracy of the JAX code}
        ("R50x1", 10, 1): ("48.4", "54.1", "66.1"),
        ("R50x1", 10, 5): ("76.7", "82.4", "85.4"),
        ("R50x1", 100, 1): ("32.0", "35.2", "37.8"),
        ("R50x1", 100, 5): ("63.4", "64.8", "66.5"),
        ("R101x3", 10, 1): ("48.7", "53.9", "65.0"),
        ("R101x3", 10, 5): ("80.2", "85.8", "88.6"),
        ("R101x3", 100, 1): ("32.1", "35.0", "37.1"),
        ("R101x3", 100, 5): ("68.6", "70.8", "71.6"),
        ("R152x2", 10, 1): ("44.0", "56.7", "65.0"),
        ("R152x2", 10, 5): ("85.3", "87.0", "88.2"),
        ("R152x2", 100, 1): ("36.4", "37.2", "38.9"),
        ("R152x2", 100, 5): ("69.3", "70.5", "72.0"),
    }
    for (architecture, classes), acc1 in full.items():
        yield _on_cifar(architecture, classes, None, Value("final_acc1", acc1, examples=CIFAR_EXAMPLES))
    for (architecture, classes, each), (lowest, median, highest) in few.items():
        value = Value("final_acc1", median, examples=CIFAR_EXAMPLES, lowest=lowest, highest=highest)
        yield _on_cifar(architecture, classes, each, value)


def _on_cifar(architecture: str, classes: int, each: int | None, value: Value) -> Figure:
    dataset = f"cifar{classes}"
    title = f"CIFAR-{classes}"
    few = "" if each is None else f" --examples-per-class {each}"
    return Figure(
        name=f"authors-{dataset}-{architecture}{'' if each is None else f'-{each}'}",
        what=f"BiT-M-{architecture} fine-tuned on {title}, "
        f"{'all examples' if each is None else f'{each} a class'}: batch 128, learning rate 0.001, 128x128",
        values=(value,),
        source=AUTHORS,
        how="training",
        words=f"hyperrule --model BiT-M-{architecture} --dataset {dataset} --global-batch 128 --base-lr 0.001 "
        f"--resize tf{few}",
        examples=CIFAR_EXAMPLES,
        data=CIFAR_DATA.format(name=dataset, title=title),
        seeds=(0,) if each is None else (0, 1, 2, 3, 4),
        steps=10_000 if each is None else 500,
        reasons=(ONE_RUN if each is None else AT_LEAST_FIVE, THEIR_FLIP, THEIR_LAST_BATCH),
        plan=PlanRequest(model=f"BiT-M-{architecture}", batch_per_device=128, crop=128, classes=classes),
    )


def tflops_a_card(rate: float, cards: int, flops: float) -> float:
    """Returns the TFLOP/s of a card that trains so many images/s with other cards.

    Args:
        rate: images/s of all cards.
        flops: floating-point operations of the forward pass for an image; a training step has three times these.
    """
    return 3 * flops * rate / cards / 1e12


# of a forward pass at 480x480: `python -m bit_jax.reproduce timm-BiT-M-R152x2-ILSVRC2012 --plan -- --size 480`
R152X2_FLOPS = 4.152e11


def _flagperf() -> Iterator[Figure]:
    rows = [
        # hosts x GPUs, batch a GPU, e2e, p_whole, p_train, p_core, acc1, memory; "" where nothing is published
        (1, 8, 16, "5869", "222", "225", "228", "0.84192", "31.4"),
        (1, 8, 20, "5505", "236", "240", "243", "0.84016", "37.4"),
        (1, 1, 16, "", "23.1", "29.5", "29.8", "", "38.1"),
        (2, 8, 20, "", "459", "465", "470", "", "36.6"),
    ]
    for hosts, gpus, batch, e2e, whole, train, core, acc1, memory in rows:
        published = [
            Value("final_acc1", acc1, "share", RANK_0_EXAMPLES, compat="rank0_acc1"),
            Value("e2e_time", e2e, "s"),
            Value("p_whole", whole, "images/s"),
            Value("p_train", train, "images/s"),
            Value("p_core", core, "images/s", compat="p_core_unsynchronized"),
            Value("mem_gib", memory, "GiB"),
        ]
        cards = "one card" if hosts * gpus == 1 else f"{hosts * gpus} cards"
        flops = tflops_a_card(float(core), hosts * gpus, R152X2_FLOPS)
        reasons = [TF32.format(rate=core, cards=cards, flops=flops), P_CORE, MEMORY, SPEED]
        if acc1:
            reasons.insert(0, ONE_SHARE.format(printed=acc1, count=f"{float(acc1) * RANK_0_EXAMPLES:,.0f}"))
        yield Figure(
            name=f"flagperf-{hosts}x{gpus}-bs{batch}",
            what=f"FlagPerf's bigtransfer case on {hosts}x{gpus} A100, {batch} a GPU: BiT-M-R152x2 on ImageNet-1k at "
            "480x480",
            values=tuple(value for value in published if value.printed),
            source=FLAGPERF,
            how="training",
            words=f"flagperf --batch-per-device {batch} --precision tf32",
            examples=IMAGENET_EXAMPLES,
            data=IMAGENET_DATA,
            reasons=tuple(reasons),
            plan=PlanRequest(hosts=hosts, devices=gpus, batch_per_device=batch, precision="tf32"),
            steps=epoch_steps(IMAGENET_TRAIN_EXAMPLES, hosts * gpus, batch),  # where both runs with an accuracy ended
        )


def _embedded() -> Iterator[Figure]:
    yield Figure(
        name="embedded-fashion-mnist",
        what="The embedded R14x0.5 on Fashion-MNIST's test images at 48x48",
        values=(Value("acc1", "89.36", examples=FASHION_EXAMPLES), Value("acc5", "99.88", examples=FASHION_EXAMPLES)),
        source=EMBEDDED,
        how="evaluation",
        words="--weights embedded --dataset idx:{data_dir}/fashion-mnist --split test",
        examples=FASHION_EXAMPLES,
        data=FASHION_DATA,
        reasons=(SAME_IMAGES, "Another CPU rounds differently, and a prediction or two may differ."),
    )
    yield Figure(
        name="embedded-digits",
        what="The embedded R14x0.5 fine-tuned on scikit-learn's digits",
        values=(Value("final_acc1", "", "share", DIGITS_EXAMPLES, lowest="0.955", highest="0.958"),),
        source=README,
        how="training",
        words="digits",
        steps=200,
        examples=DIGITS_EXAMPLES,
        data=DIGITS_DATA,
        reasons=("The published range is that of several CPUs with seed 0, which round differently.",),
    )
    yield Figure(
        name="embedded-digits-5",
        what="The embedded R14x0.5 fine-tuned on five of scikit-learn's digits a class, as `make demo` does",
        values=(Value("final_acc1", "0.838", "share", DIGITS_EXAMPLES, lowest="0.819", highest="0.866"),),
        source=README,
        how="training",
        words="digits --examples-per-class 5 --base-lr 0.01 --global-batch 32 --warmup-steps 10 --decay-steps 24 32 "
        "--steps 40",
        examples=DIGITS_EXAMPLES,
        data=DIGITS_DATA,
        seeds=(0, 1, 2),
        steps=40,
        reasons=("The published range is that of seeds 0, 1 and 2, which each draw other examples, on one CPU.",),
    )


FIGURES = {
    figure.name: figure
    for figures in (_timm(), _distilled(), _imagenet(), _cifar(), _flagperf(), _embedded())
    for figure in figures
}
