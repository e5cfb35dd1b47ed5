"""Trains a CNN on digits with PyTorch Lightning, and shows its mistakes in Weights & Biases."""

import gc
import math
import os
import signal
import sys
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import wandb
from filelock import FileLock
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torch.utils.data.distributed import DistributedSampler
from torch.utils.data.sampler import BatchSampler, SequentialSampler
from torchvision.datasets import KMNIST, MNIST, FashionMNIST
from torchvision.transforms import RandomCrop

DATASETS = {"mnist": MNIST, "fashion-mnist": FashionMNIST, "kmnist": KMNIST}
MEAN, STD = 0.1307, 0.3081  # mean and std of MNIST's pixels, scaled to [0, 1]


def choose_dataset(data_dir: str) -> str:
    """Returns "mnist" if it is in `data_dir` or can be downloaded, else "digits"."""
    if not os.path.exists(f"{data_dir}/MNIST/raw/t10k-labels-idx1-ubyte"):  # the last to be written
        try:
            with FileLock(f"{data_dir}/mnist.lock"):  # one process downloads, others wait
                MNIST(data_dir, download=True)
        except (RuntimeError, OSError):
            rank_zero_info("MNIST can't be downloaded; using scikit-learn's digits.")
            return "digits"
    return "mnist"


def load_dataset(name: str, data_dir: str, train: bool) -> TensorDataset:
    """Returns images, uint8 (N, 1, 28, 28), and labels, int64 (N,)."""
    if name == "digits":  # scikit-learn ships 1,797 images of 8 x 8 pixels, from 0 to 16
        from sklearn.datasets import load_digits

        pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
        images = F.interpolate(pixels.view(-1, 1, 8, 8) * (255 / 16), size=28, mode="bilinear")
        return TensorDataset(images.round().byte(), labels)
    dataset = DATASETS[name](data_dir, train)
    return TensorDataset(dataset.data[:, None], dataset.targets)


class DigitsDataModule(pl.LightningDataModule):
    """Batches of normalised images, float32 (N, 1, 28, 28), and labels, int64 (N,)."""

    def __init__(self, dataset: str, data_dir: str, batch_size: int) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        """Downloads the data set. Lightning calls this in one process on each machine."""
        if self.hparams.dataset in DATASETS:
            DATASETS[self.hparams.dataset](self.hparams.data_dir, download=True)

    def setup(self, stage: str) -> None:
        """Splits the data the same way every time."""
        data = load_dataset(self.hparams.dataset, self.hparams.data_dir, train=True)
        generator = torch.Generator().manual_seed(0)
        if self.hparams.dataset == "digits":
            self.train, self.val, self.test = random_split(data, [1413, 128, 256], generator)
        else:
            self.train, self.val = random_split(data, [55_000, 5_000], generator)
            self.test = load_dataset(self.hparams.dataset, self.hparams.data_dir, train=False)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.hparams.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, self.hparams.batch_size)

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        """Normalises images and, during training, shifts them at random, on the device."""
        images, labels = batch
        if self.trainer.training:
            images = RandomCrop(28, padding=1)(images)  # one shift for the whole batch
        return [(images / 255 - MEAN) / STD, labels]


class DigitClassifier(pl.LightningModule):
    """A small LeNet-style CNN, with batch normalisation."""

    def __init__(self, lr: float = 0.015) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 5, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 128, 3, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Flatten(), nn.Linear(128 * 3 * 3, 10),  # the feature maps are now 3 x 3
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        """Takes normalised images, float (N, 1, 28, 28). Returns logits, float (N, 10)."""
        # The weights can be half precision. On a CPU, channels_last is twice as fast.
        return self.network(images.to(self.dtype, memory_format=torch.channels_last))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/loss", loss)  # only these go to W&B; logging all is slower
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Logs the loss and the accuracy. Returns the logits, for ImagePredictionLogger."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        stage = "test" if self.trainer.testing else "val"
        metrics = {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}
        self.log_dict(metrics, prog_bar=True, sync_dist=True)  # means over batches and devices
        return logits

    test_step = validation_step

    def configure_optimizers(self) -> dict:
        """AdamW, with a learning rate that falls linearly to zero."""
        lr = self.hparams.lr
        optimizer = torch.optim.AdamW(self.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.05)
        num_steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass(eq=False)  # keeps it hashable, which Lightning needs
class ImagePredictionLogger(pl.Callback):
    """Shows in Weights & Biases what a classifier gets wrong, after each validation or test epoch.

    It logs the images with the highest loss, random examples, recalls and a confusion matrix:

        predictions = ImagePredictionLogger(num_samples=16, class_names=["cat", "dog"])
        trainer = pl.Trainer(logger=pl.loggers.WandbLogger(), callbacks=[predictions])
        trainer.fit(model, train_loader, val_loader)

    Batches must begin with inputs (N, ...) and integer labels (N,); negative labels are ignored.
    Steps should return logits, float (N, classes) or, for two classes, (N, 1), or {"logits":
    logits}; otherwise `module(inputs)` is called. Raises ValueError if shapes or types don't fit.
    """

    num_samples: int = 32  # images of each kind; W&B shows up to 108
    class_names: Sequence[str] | None = None  # one per class; by default, classes are numbered
    mean: Sequence[float] | None = None  # of each channel, as given to Normalize
    std: Sequence[float] | None = None  # if mean and std are given, Normalize is undone
    unpack: Callable | None = None  # for other batches: unpack(batch) returns (inputs, labels)
    to_media: Callable | None = None  # to_media(image, caption=...) replaces wandb.Image

    def on_validation_epoch_start(self, trainer, module):
        self.results = {}  # by index of the loader: see `record`
        self.in_unit_interval = True  # set to False by the first output outside [0, 1]
        self.generator = torch.Generator().manual_seed(trainer.global_rank)  # to pick the examples

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, loader_idx=None):
        inputs, labels, logits = self.read_batch(trainer, module, outputs, batch)
        indices = self.find_indices(trainer, loader_idx, batch_idx, len(labels))
        self.record(loader_idx or 0, inputs, labels, logits, indices)

    def on_validation_epoch_end(self, trainer, module):
        if self.results and self.in_unit_interval and not trainer.sanity_checking:
            rank_zero_warn("ImagePredictionLogger needs logits; these look like probabilities.")
        # all_gather needs tensors of one size, so the processes broadcast their results in turn.
        parts = [trainer.strategy.broadcast(self.results, src=i) for i in range(trainer.world_size)]
        for loader_idx in sorted(set().union(*parts)):
            parts_of_loader = [part[loader_idx] for part in parts if loader_idx in part]
            self.log_results(trainer, module, loader_idx, parts_of_loader)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def read_batch(self, trainer, module, outputs, batch) -> tuple[Tensor, Tensor, Tensor]:
        """Returns inputs (N, ...) and, on the CPU, labels, int64 (N,), and logits (N, classes)."""
        if self.unpack is None and not isinstance(batch, Sequence):
            raise ValueError(f"ImagePredictionLogger needs unpack for a {type(batch).__name__}")
        inputs, labels = self.unpack(batch) if self.unpack else batch[:2]
        labels = labels.detach().cpu()
        if (labels != labels.long()).any():
            raise ValueError("ImagePredictionLogger needs integer labels")
        labels = labels.squeeze(1) if labels.ndim == 2 else labels  # (N, 1) becomes (N,)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
        if not are_logits(logits, labels):  # the step returned a loss, for example
            with trainer.precision_plugin.val_step_context():  # the same autocast as in the step
                logits = module(inputs)
        if not are_logits(logits, labels):
            needs = "labels (N,) and logits (N, classes) or (N, 1)"
            got = f"{tuple(labels.shape)} and {getattr(logits, 'shape', logits)}"
            raise ValueError(f"ImagePredictionLogger needs {needs}, but got {got}")
        logits = logits.detach().cpu().float()
        self.in_unit_interval &= bool(((logits >= 0) & (logits <= 1)).all())
        if logits.shape[1] == 1:
            logits = F.pad(logits, (1, 0))  # to [0, x], since softmax([0, x])[1] is sigmoid(x)
        return inputs, labels.long(), logits

    def find_indices(self, trainer, loader_idx, batch_idx, batch_len: int) -> Tensor | None:
        """Returns each sample's index in the data set, -1 for repeats, or None if it's unknown."""
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        loaders = CombinedLoader(loaders).flattened  # one loader, a list or a dict becomes a list
        loader = loaders[loader_idx or 0]
        if len(loaders) > 1 and loader_idx is None:
            return None  # each batch combines batches of all loaders
        batch_sampler = getattr(loader, "batch_sampler", None)
        sampler = getattr(batch_sampler, "sampler", None)
        kinds = (type(batch_sampler), type(sampler))
        if kinds not in ((BatchSampler, SequentialSampler), (BatchSampler, DistributedSampler)):
            return None  # the order is unknown
        if getattr(sampler, "shuffle", False) or not getattr(loader, "in_order", True):
            return None  # the order is random
        size = batch_sampler.batch_size
        indices = torch.tensor(range(len(sampler))[batch_idx * size :][:size])
        if type(sampler) is DistributedSampler:
            # Process r of n gets the samples r, r + n, r + 2n, ... and, at the end, repeats.
            indices = sampler.rank + sampler.num_replicas * indices
            indices[indices >= len(sampler.dataset)] = -1
        return indices if len(indices) == batch_len else None  # collate_fn can drop samples

    def record(self, loader_idx: int, inputs, labels, logits, indices) -> None:
        """Counts the samples of a batch, and keeps those with the highest priorities."""
        names = self.name_classes(logits.shape[1])
        empty = {"names": names, "counts": Counter(), "hardest": [], "examples": []}
        results = self.results.setdefault(loader_idx, empty)
        log_probabilities = logits.log_softmax(dim=1)
        confidences, predictions = log_probabilities.exp().max(dim=1)
        losses = F.nll_loss(log_probabilities, labels.clamp(min=0), reduction="none")
        losses = losses.masked_fill(losses.isnan(), torch.inf)  # NaN is the hardest
        random_numbers = torch.rand(len(labels), generator=self.generator)  # the highest win
        valid = labels >= 0 if indices is None else (labels >= 0) & (indices >= 0)
        pairs = zip(labels[valid].tolist(), predictions[valid].tolist(), strict=True)
        results["counts"].update(pairs)
        for panel, priorities in {"hardest": losses, "examples": random_numbers}.items():
            kept = results[panel]  # (priority, image, caption), the highest priority first
            lowest = kept[-1][0] if len(kept) == self.num_samples else -math.inf
            for i in (valid & (priorities > lowest)).nonzero().flatten().tolist():
                caption = f"Pred: {names[predictions[i]]} ({confidences[i]:.0%}), "
                caption += f"Label: {names[labels[i]]}"
                caption += "" if indices is None else f" (#{indices[i]})"
                kept.append((priorities[i].item(), self.make_visible(inputs[i]), caption))
            results[panel] = self.highest(kept)

    def highest(self, samples: list[tuple]) -> list[tuple]:
        return sorted(samples, key=itemgetter(0), reverse=True)[: self.num_samples]

    def log_results(self, trainer, module, loader_idx: int, parts: list[dict]) -> None:
        """Merges the parts from all processes, and logs the results for one loader."""
        names, counts = parts[0]["names"], sum((part["counts"] for part in parts), Counter())
        labels = [label for label, _ in counts.elements()]
        predictions = [prediction for _, prediction in counts.elements()]
        recalls = {names[c]: counts[c, c] / n for c, n in sorted(Counter(labels).items())}
        stage = "test" if trainer.testing else "val"
        suffix = f"/dataloader_idx_{loader_idx}" if loader_idx > 0 else ""
        runs = [logger.experiment for logger in trainer.loggers]
        runs = [run for run in runs if isinstance(run, wandb.Run) or trainer.fast_dev_run]
        if not runs:
            rank_zero_warn("ImagePredictionLogger logs nothing: the Trainer has no WandbLogger.")
        for run in runs:
            row, chart, show = {}, {}, self.to_media or wandb.Image
            for panel in ("hardest", "examples"):
                samples = self.highest([sample for part in parts for sample in part[panel]])
                media = [show(image, caption=caption) for _, image, caption in samples]
                row[f"{stage}/{panel}{suffix}"] = media
            if len(names) <= 100:
                row |= {f"{stage}/recall/{name}{suffix}": recalls[name] for name in recalls}
                matrix = wandb.plot.confusion_matrix(None, labels, predictions, names)
                chart = {f"{stage}/confusion_matrix{suffix}": matrix}
            if not trainer.sanity_checking:  # a rehearsal, to see errors early
                run.log(row, commit=False)  # Lightning commits the row with its own metrics
                with suppress(wandb.errors.CommError):  # raised if the connection is lost
                    run.log(chart, commit=False)
        key, lowest = f"{stage}/lowest_recall{suffix}", min(recalls.values(), default=math.nan)
        module.log(key, lowest, sync_dist=True, add_dataloader_idx=False)

    def name_classes(self, num_classes: int) -> list[str]:
        """Returns unique class names, or numbers if `class_names` is None."""
        names = range(num_classes) if self.class_names is None else self.class_names
        if len(names) != num_classes:
            raise ValueError(f"ImagePredictionLogger: {len(names)} class_names for {num_classes}")
        are_unique = len(set(names)) == num_classes
        return [str(name) if are_unique else f"{name} ({i})" for i, name in enumerate(names)]

    def make_visible(self, image: Tensor) -> Tensor:
        """Returns a copy, as uint8 from 0 to 255, because W&B 0.31 casts floats without scaling."""
        image = image.detach().to("cpu", copy=True)  # a view would keep the whole batch
        if self.to_media is None and (image.ndim != 3 or len(image) not in (1, 3)):
            raise ValueError(f"ImagePredictionLogger needs unpack or to_media for {image.shape}")
        if image.ndim < 3 or image.dtype == torch.uint8:
            return image  # not an image, e.g. audio, or already uint8
        image = image.float().nan_to_num()
        if self.mean is not None and self.std is not None:
            mean, std = torch.tensor(self.mean), torch.tensor(self.std)
            image = (image.movedim(0, -1) * std + mean).movedim(-1, 0)
            image = image / (255 if mean.max() > 1 else 1)
        elif image.min() < 0 or image.max() > 1:
            rank_zero_warn("ImagePredictionLogger rescales images; are mean and std missing?")
            image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-9)
        return (image.clamp(0, 1) * 255).round().byte()


def are_logits(out, labels: Tensor) -> bool:
    is_float = isinstance(out, Tensor) and out.is_floating_point()
    return is_float and out.ndim == 2 and out.shape[:1] == labels.shape


class StopAtSigterm(pl.Callback):
    """Exits on SIGTERM. Lightning's own handler, set just before, can hang in a collective."""

    def on_train_start(self, trainer, module):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    on_sanity_check_start = on_test_start = on_train_start


def choose_wandb_mode() -> str:
    """Returns "offline" if there is no account or no connection, else W&B's own setting."""
    mode = wandb.setup().settings.mode
    if mode != "online":
        return mode
    with suppress(wandb.errors.AuthenticationError):  # W&B rejects the key, or can't be reached
        if wandb.login(prompt=False):  # False if there is no key
            return mode
    return "offline"


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--gpus", type=int, default=SUPPRESS, help="short for --accelerator gpu --devices GPUS")
    add("--accelerator", default="auto", help="cpu, gpu, tpu, mps or auto")
    add("--devices", default="auto", help="a number, a list such as 0,1, or -1 for all")
    add("--strategy", default="auto", help="ddp, fsdp, ...")
    add("--num_nodes", type=int, default=1, help="number of machines")
    add("--precision", default="32-true", help="32-true, 16-mixed, bf16-mixed, ...")
    add("--max_epochs", type=int, default=5, help="passes over the training set")
    add("--fast_dev_run", action="store_true", help="one batch of each stage; writes no files")
    add("--batch_size", type=int, default=128, help="samples per batch, on each device")
    add("--lr", type=float, default=0.015, help="learning rate at the start; it falls to zero")
    add("--seed", type=int, default=0, help="for initial weights, shuffling and random crops")
    add("--dataset", default="auto", choices=["auto", *DATASETS, "digits"], help="mnist or digits")
    add("--data_dir", default="data", help="folder of the data set, which is downloaded if missing")
    add("--num_samples", type=int, default=32, help="images per panel, up to 108")
    add("--ckpt_path", default=SUPPRESS, help="checkpoint to resume from")
    add("--project", default=os.environ.get("WANDB_PROJECT", "lightning-digits"), help="in W&B")
    return parser


def make_trainer(args: Namespace) -> pl.Trainer:
    if "gpus" in args:
        args.accelerator = "gpu" if args.gpus else "cpu"
        args.devices = args.gpus or "auto"
    flags = ["accelerator", "devices", "strategy", "num_nodes", "precision", "max_epochs"]
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # seconds, if the connection is lost
    mode = "disabled" if args.fast_dev_run else choose_wandb_mode()
    names = None if args.dataset in ("mnist", "digits") else DATASETS[args.dataset].classes
    return pl.Trainer(
        **{flag: getattr(args, flag) for flag in flags},
        fast_dev_run=args.fast_dev_run,
        log_every_n_steps=10,
        logger=pl.loggers.WandbLogger(project=args.project, save_dir=None, mode=mode),
        callbacks=[
            ImagePredictionLogger(
                num_samples=args.num_samples, class_names=names, mean=[MEAN], std=[STD]
            ),
            StopAtSigterm(),
            LearningRateMonitor(),
            TQDMProgressBar(refresh_rate=20),
            ModelCheckpoint(monitor="val/loss", save_top_k=-1, save_last=not args.fast_dev_run),
        ],
    )


def main(argv: list[str] | None = None) -> None:
    """Trains, then tests the checkpoint with the lowest validation loss."""
    args = make_parser().parse_args(argv)
    if min(args.max_epochs, args.num_nodes, args.num_samples) < 1:
        sys.exit("--max_epochs, --num_nodes and --num_samples must be positive")
    pl.seed_everything(args.seed, verbose=False)
    if args.dataset == "auto":
        args.dataset = "digits" if args.fast_dev_run else choose_dataset(args.data_dir)
    trainer = make_trainer(args)
    trainer.logger.log_hyperparams(vars(args))  # starts the run
    data = DigitsDataModule(args.dataset, args.data_dir, args.batch_size)
    try:
        # With weights_only=True, no checkpoint can execute code.
        ckpt_path = vars(args).get("ckpt_path")
        trainer.fit(DigitClassifier(args.lr), data, ckpt_path=ckpt_path, weights_only=True)
        if not math.isfinite(trainer.callback_metrics.get("val/loss", 0)):
            raise FloatingPointError("val/loss is not finite: try a lower --lr")
        best_path = trainer.checkpoint_callback.best_model_path or None  # None in a fast_dev_run
        trainer.test(trainer.lightning_module, data, ckpt_path=best_path, weights_only=True)
        with suppress(wandb.errors.CommError):  # no connection, but the file is on disk
            trainer.logger.experiment.log_model(best_path, "digit-classifier", ["best"])
    except BaseException:
        wandb.finish(exit_code=1)  # prints W&B's summary now, so that the error comes last
        raise
    trainer.print("Checkpoint:", best_path)


if __name__ == "__main__":
    gc.freeze()  # exempts imported modules from garbage collection: epochs are 14% faster
    main()
