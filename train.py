"""Trains a CNN on digits with PyTorch Lightning and shows its mistakes in Weights & Biases."""

import gc
import math
import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import wandb
from filelock import FileLock
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler, TensorDataset
from torchvision.datasets import MNIST
from torchvision.transforms import RandomCrop

MEAN, STD = 0.1307, 0.3081  # mean and std of MNIST's pixels, scaled to [0, 1]


def choose_dataset(data_dir: str) -> str:
    """Returns "mnist" if it is in `data_dir` or can be downloaded, else "digits"."""
    if os.path.exists(f"{data_dir}/MNIST/raw/t10k-labels-idx1-ubyte"):  # written last
        return "mnist"
    with suppress(RuntimeError, OSError), FileLock(f"{data_dir}/mnist.lock"):
        MNIST(data_dir, download=True)  # one process downloads while the others wait
        return "mnist"
    rank_zero_info("MNIST can't be downloaded; using scikit-learn's digits.")
    return "digits"


def load_dataset(name: str, data_dir: str, train: bool) -> TensorDataset:
    """Returns images, uint8 (N, 1, 28, 28), and labels, int64 (N,)."""
    if name == "mnist":
        dataset = MNIST(data_dir, train)
        return TensorDataset(dataset.data[:, None], dataset.targets)
    from sklearn.datasets import load_digits

    pixels, labels = map(torch.tensor, load_digits(return_X_y=True))  # pixels from 0 to 16
    images = F.interpolate(pixels.view(-1, 1, 8, 8) * (255 / 16), size=28, mode="bilinear")
    is_test = torch.arange(len(labels)) % 7 == 6  # every seventh image
    mask = ~is_test if train else is_test
    return TensorDataset(images.round().byte()[mask], labels[mask])


class DigitsDataModule(pl.LightningDataModule):
    """Batches of normalised images, float32 (N, 1, 28, 28), and labels, int64 (N,)."""

    def __init__(self, dataset: str, data_dir: str, batch_size: int) -> None:
        super().__init__()
        self.save_hyperparameters()

    def prepare_data(self) -> None:
        if self.hparams.dataset == "mnist":
            MNIST(self.hparams.data_dir, download=True)  # does nothing if it is there already

    def setup(self, stage: str) -> None:
        data = load_dataset(self.hparams.dataset, self.hparams.data_dir, train=True)
        generator = torch.Generator().manual_seed(0)  # the same split in every run
        self.train, self.val = torch.utils.data.random_split(data, [11 / 12, 1 / 12], generator)
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
            images = RandomCrop(28, padding=1)(images)  # one shift per batch, for speed
        return [(images / 255 - MEAN) / STD, labels]


class DigitClassifier(pl.LightningModule):
    """A small LeNet-style CNN, with batch normalisation."""

    def __init__(self, lr: float) -> None:
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
        images = images.to(self.dtype)  # the weights' dtype, for --precision bf16-true
        return self.network(images.to(memory_format=torch.channels_last))  # faster on a CPU

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        stage = "test" if self.trainer.testing else "val"
        metrics = {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}
        self.log_dict(metrics, prog_bar=True, sync_dist=True)  # averaged over samples and devices
        return logits  # for ImagePredictionLogger

    test_step = validation_step

    def configure_optimizers(self) -> dict:
        lr = self.hparams.lr
        optimizer = torch.optim.AdamW(self.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.05)
        num_steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_steps)  # down to zero
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@dataclass
class Results:
    """What the callback collects from one data loader during an epoch."""

    class_names: list[str]
    labels: list[int] = field(default_factory=list)
    predictions: list[int] = field(default_factory=list)
    hardest: list[tuple] = field(default_factory=list)  # (loss, image, caption), highest first
    examples: list[tuple] = field(default_factory=list)  # (random number, image, caption)


@dataclass(eq=False)  # Lightning needs callbacks to be hashable
class ImagePredictionLogger(pl.Callback):
    """Logs to Weights & Biases what a classifier gets wrong, after each validation or test epoch:
    the images with the highest loss, random examples, recalls and a confusion matrix.

        predictions = ImagePredictionLogger(num_samples=16, class_names=["cat", "dog"])
        trainer = pl.Trainer(logger=pl.loggers.WandbLogger(), callbacks=[predictions])
        trainer.fit(model, train_loader, val_loader)

    Batches must begin with inputs (N, ...) and integer labels (N,); negative labels are ignored.
    Steps should return logits, float (N, classes) or, for two classes, (N, 1), or {"logits":
    logits}; otherwise `module(inputs)` is called. Raises ValueError if the shapes don't match.
    """

    num_samples: int = 32  # number of hardest images, and of random ones; W&B shows up to 108
    class_names: Sequence[str] | None = None  # one per class; by default, classes are numbered
    mean: Sequence[float] | None = None  # mean per channel given to Normalize, to undo it
    std: Sequence[float] | None = None  # standard deviation per channel; give both or neither
    unpack: Callable | None = None  # unpack(batch) returns (inputs, labels), for other formats
    to_media: Callable | None = None  # to_media(image, caption=...) replaces wandb.Image

    def on_validation_epoch_start(self, trainer, module):
        self.results = {}  # {loader_idx: Results}
        self.look_like_probabilities = True  # until an output lies outside [0, 1]
        self.generator = torch.Generator().manual_seed(trainer.global_rank)  # draws the examples

    # Lightning passes its dataloader_idx only when it runs several loaders in sequence.
    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, loader_idx=None):
        inputs, labels, logits = self.read_batch(trainer, module, outputs, batch)
        indices = self.find_indices(trainer, batch_idx, loader_idx, len(labels))
        keep = labels >= 0  # negative labels are ignored
        if indices is not None:
            keep &= indices >= 0  # so are duplicates (index -1)
        names = self.name_classes(logits.shape[1])
        results = self.results.setdefault(loader_idx, Results(names))
        confidences, predictions = logits.softmax(dim=1).max(dim=1)
        results.labels += labels[keep].tolist()
        results.predictions += predictions[keep].tolist()
        losses = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
        losses = losses.masked_fill(losses.isnan(), torch.inf).tolist()  # NaN ranks first
        # Keeping the samples with the highest random numbers gives a uniform random sample.
        random_numbers = torch.rand(len(labels), generator=self.generator).tolist()
        for samples, priorities in [(results.hardest, losses), (results.examples, random_numbers)]:
            for i in keep.nonzero().flatten().tolist():  # samples[-1] has the lowest priority
                if len(samples) < self.num_samples or priorities[i] > samples[-1][0]:
                    caption = f"Pred: {names[predictions[i]]} ({confidences[i]:.0%}), "
                    caption += f"Label: {names[labels[i]]}"
                    caption += "" if indices is None else f" (#{indices[i]})"
                    samples.append((priorities[i], self.make_visible(inputs[i]), caption))
                    self.keep_highest(samples)

    def on_validation_epoch_end(self, trainer, module):
        if self.results and self.look_like_probabilities and not trainer.sanity_checking:
            rank_zero_warn("ImagePredictionLogger needs logits; these look like probabilities.")
        merged = {}  # the results of all processes
        for rank in range(trainer.world_size):  # each process in turn sends its results to all
            for loader_idx, part in trainer.strategy.broadcast(self.results, src=rank).items():
                results = merged.setdefault(loader_idx, Results(part.class_names))
                results.labels += part.labels
                results.predictions += part.predictions
                results.hardest += part.hardest
                results.examples += part.examples
        for loader_idx, results in merged.items():
            self.keep_highest(results.hardest)
            self.keep_highest(results.examples)
            self.log_results(trainer, module, loader_idx, results)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def keep_highest(self, samples: list[tuple]) -> None:
        samples.sort(key=lambda sample: sample[0], reverse=True)
        del samples[self.num_samples :]

    def read_batch(self, trainer, module, outputs, batch) -> tuple[Tensor, Tensor, Tensor]:
        """Returns inputs (N, ...) and, on the CPU, labels, int64 (N,), and logits (N, classes)."""
        if self.unpack is None and not isinstance(batch, Sequence):
            raise ValueError(f"ImagePredictionLogger needs unpack for a {type(batch).__name__}")
        inputs, labels = self.unpack(batch) if self.unpack else batch[:2]
        labels = labels.detach().cpu()
        labels = labels.squeeze(1) if labels.ndim == 2 else labels  # (N, 1) becomes (N,)
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
        if not self.are_logits(logits, labels):  # the step returned a loss, for example
            with trainer.precision_plugin.val_step_context():  # validation_step's autocast
                logits = module(inputs)
        if not self.are_logits(logits, labels) or (labels != labels.long()).any():
            needs = "integer labels (N,) and logits (N, classes) or (N, 1)"
            got = f"{labels.dtype} {tuple(labels.shape)} and {getattr(logits, 'shape', logits)}"
            raise ValueError(f"ImagePredictionLogger needs {needs}, but got {got}")
        logits = logits.detach().cpu().float()
        self.look_like_probabilities &= bool(((logits >= 0) & (logits <= 1)).all())
        if logits.shape[1] == 1:
            logits = F.pad(logits, (1, 0))  # x becomes [0, x]: softmax([0, x])[1] is sigmoid(x)
        return inputs, labels.long(), logits

    def are_logits(self, output, labels: Tensor) -> bool:
        is_float = isinstance(output, Tensor) and output.is_floating_point()
        return is_float and output.ndim == 2 and output.shape[:1] == labels.shape

    def name_classes(self, num_classes: int) -> list[str]:
        """Returns unique class names, or numbers if `class_names` is None."""
        names = range(num_classes) if self.class_names is None else self.class_names
        if len(names) != num_classes:
            raise ValueError(f"ImagePredictionLogger: {len(names)} names for {num_classes} classes")
        are_unique = len(set(names)) == num_classes
        return [str(name) if are_unique else f"{name} ({i})" for i, name in enumerate(names)]

    def find_indices(self, trainer, batch_idx, loader_idx, batch_len) -> Tensor | None:
        """Returns the samples' indices in the data set, int64 (N,), or None if they are unknown. -1
        marks duplicates: a DistributedSampler adds some to give every process the same number."""
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        loaders = CombinedLoader(loaders).flattened  # makes one loader, a list or a dict a list
        if loader_idx is None and len(loaders) > 1:
            return None  # Lightning combines the batches of several loaders
        loader = loaders[loader_idx or 0]
        if not isinstance(loader, DataLoader) or loader.batch_size is None or not loader.in_order:
            return None  # custom batching, or batches may arrive out of order
        sampler, start = loader.sampler, batch_idx * loader.batch_size
        is_distributed = type(sampler) is DistributedSampler and not sampler.shuffle
        if type(sampler) is not SequentialSampler and not is_distributed:
            return None  # shuffled, or in a custom order
        indices = torch.arange(start, min(start + loader.batch_size, len(sampler)))
        if len(indices) != batch_len:
            return None  # collate_fn or unpack has changed the number of samples
        if is_distributed:  # dealt out in turn: the second of two processes gets 1, 3, 5, ...
            indices = sampler.rank + sampler.num_replicas * indices
            indices[indices >= len(sampler.dataset)] = -1
        return indices

    def make_visible(self, image: Tensor) -> Tensor:
        """Returns a copy. Images become uint8, which W&B shows as they are, unlike floats."""
        image = image.detach().to("cpu", copy=True)  # a view would keep the whole batch alive
        if self.to_media is None and (image.ndim != 3 or len(image) not in (1, 3)):
            raise ValueError(f"ImagePredictionLogger needs unpack or to_media for {image.shape}")
        if image.ndim < 3 or image.dtype == torch.uint8:
            return image  # text or audio for to_media, or already uint8
        image = image.float().nan_to_num()
        if self.mean is not None or self.std is not None:
            mean, std = torch.as_tensor(self.mean), torch.as_tensor(self.std)
            max_pixel = 255 if mean.max() > 1 else 1  # the pixels were 0 to 255, or 0 to 1
            image = (image.movedim(0, -1) * std + mean).movedim(-1, 0) / max_pixel
        elif image.min() < 0 or image.max() > 1:
            rank_zero_warn("ImagePredictionLogger rescales images; are mean and std missing?")
            image = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-9)
        return (image.clamp(0, 1) * 255).round().byte()

    def log_results(self, trainer, module, loader_idx, results: Results) -> None:
        stage = "test" if trainer.testing else "val"
        suffix = "" if loader_idx is None else f"/dataloader_idx_{loader_idx}"
        counts = Counter(zip(results.labels, results.predictions, strict=True))
        totals = Counter(results.labels)
        recalls = {results.class_names[c]: counts[c, c] / totals[c] for c in sorted(totals)}
        key, lowest = f"{stage}/lowest_recall{suffix}", min(recalls.values(), default=math.nan)
        module.log(key, lowest, sync_dist=True, add_dataloader_idx=False)  # needs all processes
        if trainer.sanity_checking or trainer.fast_dev_run:
            self.make_row(results, recalls)  # logs nothing, but errors surface early
            return
        runs = [logger.experiment for logger in trainer.loggers]
        runs = [run for run in runs if isinstance(run, wandb.Run)]  # only rank zero has any
        if not runs:
            rank_zero_warn("ImagePredictionLogger logs nothing: the Trainer has no WandbLogger.")
        # After this hook, Lightning logs lowest_recall and other metrics, which commits the row.
        # Until then, commit=False keeps it open, so that everything lands on the same step.
        for run in runs:  # each needs its own media objects
            for name, value in self.make_row(results, recalls).items():
                with suppress(wandb.errors.CommError):  # raised if the chart can't be uploaded
                    run.log({f"{stage}/{name}{suffix}": value}, commit=False)

    def make_row(self, results: Results, recalls: dict) -> dict:
        show, names = self.to_media or wandb.Image, results.class_names
        row = {}
        row["hardest"] = [show(image, caption=caption) for _, image, caption in results.hardest]
        row["examples"] = [show(image, caption=caption) for _, image, caption in results.examples]
        if len(names) <= 100:
            row |= {f"recall/{name}": recall for name, recall in recalls.items()}
            chart = wandb.plot.confusion_matrix(None, results.labels, results.predictions, names)
            row["confusion_matrix"] = chart
        return row


class StopAtSigterm(pl.Callback):
    """Exits on SIGTERM. Lightning's own handler can hang, so these later hooks replace it."""

    def on_train_start(self, trainer, module):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    on_sanity_check_start = on_test_start = on_train_start


def choose_mode() -> str:
    """Returns W&B's configured mode, but "offline" if there is no account or no connection."""
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # seconds; by default, W&B waits forever
    mode = wandb.setup().settings.mode
    with suppress(wandb.errors.AuthenticationError):  # W&B rejects the key, or can't be reached
        if mode != "online" or wandb.login(prompt=False):  # False without a key
            return mode
    return "offline"


def make_parser() -> ArgumentParser:
    parser = ArgumentParser()
    add = parser.add_argument
    add("--gpus", type=int, help="short for --accelerator gpu --devices GPUS")
    add("--accelerator", default="auto", help="cpu, gpu, tpu, mps or auto (%(default)s)")
    add("--devices", default="auto", help="number, list such as 0,1, or -1 for all (%(default)s)")
    add("--strategy", default="auto", help="ddp, fsdp, ... (%(default)s)")
    add("--num_nodes", type=int, default=1, help="machines (%(default)s)")
    add("--precision", default="32-true", help="32-true, 16-mixed, bf16-mixed, ... (%(default)s)")
    add("--max_epochs", type=int, default=5, help="passes over the training set (%(default)s)")
    add("--fast_dev_run", action="store_true", help="one batch of each stage; writes no files")
    add("--batch_size", type=int, default=128, help="samples per batch and device (%(default)s)")
    add("--lr", type=float, default=0.015, help="initial learning rate, falls to 0 (%(default)s)")
    add("--seed", type=int, default=0, help="for weights, shuffling and crops (%(default)s)")
    add("--dataset", default="auto", choices=["auto", "mnist", "digits"], help="auto: try mnist")
    add("--data_dir", default="data", help="folder to download MNIST to (%(default)s)")
    add("--num_samples", type=int, default=32, help="images of each kind, up to 108 (%(default)s)")
    add("--ckpt_path", help="checkpoint to resume from")
    add("--project", default=os.environ.get("WANDB_PROJECT", "lightning-digits"), help="in W&B")
    return parser


def make_trainer(args: Namespace) -> pl.Trainer:
    if args.gpus is not None:
        args.accelerator, args.devices = "gpu", args.gpus
    flags = ["accelerator", "devices", "strategy", "num_nodes", "precision", "max_epochs"]
    mode = None if args.fast_dev_run else choose_mode()  # a fast_dev_run needs no server
    return pl.Trainer(
        **{flag: getattr(args, flag) for flag in flags},
        fast_dev_run=args.fast_dev_run,
        log_every_n_steps=10,
        # save_dir=None lets W&B choose the folder, so that WANDB_DIR has an effect.
        logger=pl.loggers.WandbLogger(project=args.project, save_dir=None, mode=mode),
        callbacks=[
            ImagePredictionLogger(num_samples=args.num_samples, mean=[MEAN], std=[STD]),
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
    if args.dataset == "auto":  # decided here, so that W&B's config names the data set
        args.dataset = "digits" if args.fast_dev_run else choose_dataset(args.data_dir)
    trainer = make_trainer(args)
    trainer.logger.log_hyperparams(vars(args))  # starts the run
    data = DigitsDataModule(args.dataset, args.data_dir, args.batch_size)
    model = DigitClassifier(args.lr)
    try:
        # weights_only=True unpickles safely. Despite its name, it restores the optimizer, too.
        trainer.fit(model, data, ckpt_path=args.ckpt_path, weights_only=True)
        if not math.isfinite(trainer.callback_metrics.get("val/loss", 0)):
            raise FloatingPointError("val/loss is not finite: try a lower --lr")
        best_path = trainer.checkpoint_callback.best_model_path or None  # None in a fast_dev_run
        trainer.test(model, data, ckpt_path=best_path, weights_only=True)
        with suppress(wandb.errors.CommError):  # no connection, but the file is on disk
            trainer.logger.experiment.log_model(best_path, "digit-classifier", ["best"])
    except BaseException:  # Ctrl+C and SIGTERM too
        wandb.finish(exit_code=1)  # here, so that the error is printed after W&B's output
        raise
    trainer.print("Checkpoint:", best_path)


if __name__ == "__main__":
    gc.freeze()  # exempts imported objects from garbage collection: epochs run 14% faster
    main()
