"""Train a CNN on handwritten digits with PyTorch Lightning, and see in Weights & Biases what it gets wrong.

    python train.py                                      # on whatever this machine has: CPU, GPU, TPU
    python train.py --gpus 1 --precision bf16-mixed
    python train.py --gpus 8 --num_nodes 2 --strategy ddp

Read it from the top: it is in the order in which a batch meets it.
"""

import argparse
import logging
import math
import os
import shlex
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# In seconds; by its own defaults, a W&B server that has gone would hold training up for minutes.
for wait, seconds in {"HTTP": 5, "INIT": 15, "FINISH": 60}.items():
    os.environ.setdefault(f"WANDB_{wait}_TIMEOUT", str(seconds))
import wandb.apis.public  # before torch: wandb.init would import it, which takes a second longer among torch's modules

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.plugins import TorchCheckpointIO
from pytorch_lightning.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchvision.datasets import KMNIST, MNIST, FashionMNIST
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.transforms import RandomCrop

DATASETS = {"mnist": MNIST, "fashion-mnist": FashionMNIST, "kmnist": KMNIST}


class UserError(Exception):
    """What the user can mend: `main` answers with its one line and exit status 2."""


class Digits(Dataset):
    """The part `indices`, int64 (n,), of images, uint8 (N, 1, 28, 28), and labels, int64 (N,)."""

    def __init__(self, images: Tensor, labels: Tensor, indices: Tensor) -> None:
        self.images, self.labels, self.indices = images, labels, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """A batch is one index into each tensor, not a loop over items: images, labels and indices of the positions."""
        indices = self.indices[torch.tensor(positions, dtype=torch.int64)]
        return self.images[indices], self.labels[indices], indices


class DigitsDataModule(pl.LightningDataModule):
    """MNIST or one of its siblings, or the 1,797 digits that scikit-learn ships: no file, no network.

    The split is the same whatever the seed, so that the same validation digits can be compared between runs.

    Args:
        dataset: mnist, fashion-mnist, kmnist or digits; None: mnist, or digits where it can't be had.
        data_dir: where torchvision keeps its data sets.
        batch_size: samples per device and step.
        seed: of the training order.
        download: whether to download what is not in `data_dir`.
    """

    def __init__(self, dataset: str | None = None, data_dir: str = "data", batch_size: int = 128, seed: int = 0,
                 download: bool = True) -> None:
        super().__init__()
        self.dataset, self.data_dir, self.download = dataset, Path(data_dir), download
        self.batch_size, self.seed = batch_size, seed
        self.loaded: str | None = None

    def prepare_data(self) -> None:
        """Downloads and checks, once on each node. Raises UserError where that fails and there is nothing instead."""
        if self.loaded:
            return
        wanted = self.dataset or "mnist"
        if wanted != "digits" and not all(file.exists() for file in self._files(wanted)):
            try:
                self._download(DATASETS[wanted])
            except Exception as error:
                reason = " ".join(str(error).split())
                if isinstance(error, (FileExistsError, NotADirectoryError, PermissionError)):
                    raise UserError(f"--data_dir {self.data_dir} can't be written ({reason}): name another") from error
                if self.dataset:
                    raise UserError(f"{wanted} is not in --data_dir {self.data_dir} and can't be downloaded ({reason}):"
                                    " put its four files there, or try --dataset digits") from error
                print(f"MNIST is not in {self.data_dir} and can't be downloaded ({reason}): training on scikit-learn's "
                      f"digits instead. For MNIST, put its four files into {self.data_dir}/MNIST/raw.")
                wanted = "digits"
        self.dataset = wanted
        self._load()

    def _download(self, dataset: type[MNIST], patience: float = 14) -> None:
        """torchvision's download, in a folder of its own until it is whole; given up after `patience` idle seconds."""
        if not self.download:
            raise RuntimeError("--fast_dev_run downloads nothing")
        raw, errors = self.data_dir / dataset.__name__ / "raw", []
        raw.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw, ignore_cleanup_errors=True) as folder:

            def fetch() -> None:
                try:
                    dataset(folder, download=True)
                except Exception as error:
                    errors.append(error)

            # In a thread, since neither urllib nor the look-up of a host's name has a time limit of its own.
            (thread := threading.Thread(target=fetch, daemon=True)).start()
            before, received = -1, 0
            while thread.is_alive() and before < received:
                thread.join(patience)
                before, received = received, sum(file.stat().st_size for file in Path(folder).rglob("*"))
            if thread.is_alive() or errors:
                raise errors[0] if errors else TimeoutError(f"no answer in {patience} seconds")
            for file in Path(folder).rglob("*-ubyte"):
                file.replace(raw / file.name)

    def _files(self, dataset: str) -> list[Path]:
        raw = self.data_dir / DATASETS[dataset].__name__ / "raw"
        return [raw / f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]

    def setup(self, stage: str | None = None) -> None:
        """Loads, in every process, the data set that rank zero has. Raises UserError if a file is damaged."""
        if self.trainer is not None:
            self.dataset = self.trainer.strategy.broadcast(self.dataset)
        if self.loaded != self.dataset:
            self._load()

    def _load(self) -> None:
        generator = torch.Generator().manual_seed(0)
        if self.dataset == "digits":
            from sklearn.datasets import load_digits

            images = torch.tensor(load_digits().images)[:, None] * (255 / 16)
            images = F.interpolate(images, size=28, mode="bilinear").round().to(torch.uint8)
            labels = torch.tensor(load_digits().target)
            rest, test = torch.randperm(len(labels), generator=generator).tensor_split([len(labels) * 6 // 7])
            self.test = Digits(images, labels, test)
        else:
            files = self._files(self.dataset)
            images, labels = read_pair(*files[:2])
            test_images, test_labels = read_pair(*files[2:])
            rest = torch.randperm(len(labels), generator=generator)
            self.test = Digits(test_images, test_labels, torch.arange(len(test_labels)))
        train, val = rest.tensor_split([len(rest) - len(rest) // 12])
        if self.dataset == "digits":
            train = train.repeat(8)  # they are few: an epoch goes over them eight times
        self.train, self.val = Digits(images, labels, train), Digits(images, labels, val)
        self.loaded = self.dataset

    @property
    def class_names(self) -> list[str]:
        return [name.split(" - ")[0] for name in DATASETS.get(self.dataset, MNIST).classes]

    @property
    def rank_and_world_size(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def train_dataloader(self) -> DataLoader:
        """In an order that only seed and epoch decide: a resumed run sees the batches of one that never stopped."""
        rank, world_size = self.rank_and_world_size
        sampler = DistributedSampler(self.train, world_size, rank, shuffle=True, seed=self.seed)
        sampler.set_epoch(self.trainer.current_epoch if self.trainer is not None else 0)  # Lightning's comes too late
        return DataLoader(self.train, self.batch_size, sampler=sampler, collate_fn=tuple)

    def _each_once(self, part: Digits) -> DataLoader:
        """A DistributedSampler would repeat samples to make the ranks' shares equal; here it is the number of batches
        that is equal, and a rank's last one may be smaller than the others', or empty."""
        rank, world_size = self.rank_and_world_size
        step = self.batch_size * world_size
        batches = [range(start + rank, min(start + step, len(part)), world_size) for start in range(0, len(part), step)]
        return DataLoader(part, batch_sampler=batches, collate_fn=tuple)

    def val_dataloader(self) -> DataLoader:
        return self._each_once(self.val)

    def test_dataloader(self) -> DataLoader:
        return self._each_once(self.test)


def read_pair(images_file: Path, labels_file: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 1, 28, 28) and labels int64 (N,) of two files in MNIST's format.

    Raises:
        UserError: one of them is damaged.
    """
    file = images_file
    try:
        images = read_image_file(str(images_file))[:, None]
        if images.shape[1:] != (1, 28, 28) or len(images) < 12:
            raise ValueError(f"{len(images)} images of {tuple(images.shape[2:])} pixels")
        file = labels_file
        labels = read_label_file(str(labels_file))
        if len(labels) != len(images) or labels.min() < 0 or labels.max() > 9:
            raise ValueError(f"{len(labels)} labels from {labels.min()} to {labels.max()} for {len(images)} images")
    except Exception as error:
        reason = " ".join(str(error).split()) or "not MNIST's format"
        raise UserError(f"{file} is damaged ({reason}): delete it, and it will be downloaded again") from error
    return images, labels


class DigitClassifier(pl.LightningModule):
    """LeNet's shape with batch norm. It takes raw pixels, so that nobody can normalise them in another way.

    Args:
        lr: the highest learning rate of the one-cycle schedule (Smith and Topin, arXiv:1708.07120).
        seed: of the augmentation.
        command_line: whatever else shall be kept in the checkpoint and in W&B's config.
    """

    MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels, from 0 to 1

    def __init__(self, lr: float = 0.02, seed: int = 0, **command_line: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 5, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 128, 3, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Flatten(), nn.Linear(128 * 3 * 3, 10),
        ).to(memory_format=torch.channels_last)
        self.augment = RandomCrop(28, padding=1)
        self.train_accuracy, self.val_accuracy, self.test_accuracy = (
            MulticlassAccuracy(10, average="micro") for _ in range(3))
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()

    def forward(self, images: Tensor) -> Tensor:
        """Raw pixels uint8 (N, 1, 28, 28) to logits (N, 10)."""
        return self.network(((images.float() / 255 - self.MEAN) / self.STD).to(self.dtype))

    def denormalize(self, inputs: Tensor) -> Tensor:
        """What `network` was given, as pixels uint8: the data set's, byte for byte, if nothing went wrong."""
        return ((inputs.float() * self.STD + self.MEAN) * 255).round().clamp(0, 255).to(torch.uint8)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        images, labels, _ = batch
        # A resumed run crops as one that never stopped, and every rank in its own way. (Where there is no GPU,
        # torch.manual_seed takes 2 ms to note down that it should be seeded too.)
        position = self.global_step * self.trainer.world_size + self.global_rank
        torch.default_generator.manual_seed((self.hparams.seed << 32) + position)
        logits = self(self.augment(images))  # one crop for the whole batch: it costs nothing
        loss = F.cross_entropy(logits, labels)
        self.train_accuracy.update(logits, labels)
        self.log("train/loss", loss, prog_bar=True)
        return {"loss": loss, "logits": logits.detach()}

    def on_train_epoch_end(self) -> None:
        self.log("train/accuracy", self.train_accuracy)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._evaluate(batch, self.val_accuracy, self.val_loss)

    def on_validation_epoch_end(self) -> None:
        self.log_dict({"val/accuracy": self.val_accuracy, "val/loss": self.val_loss}, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._evaluate(batch, self.test_accuracy, self.test_loss)

    def on_test_epoch_end(self) -> None:
        self.log_dict({"test/accuracy": self.test_accuracy, "test/loss": self.test_loss})

    def _evaluate(self, batch: tuple[Tensor, Tensor, Tensor], accuracy: MulticlassAccuracy, loss: MeanMetric) -> Tensor:
        images, labels, _ = batch
        logits = self(images)
        if len(labels):  # a rank's last batch may be empty, which torchmetrics' accuracy refuses
            accuracy.update(logits, labels)
        loss.update(F.cross_entropy(logits, labels, reduction="none"))
        return logits

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr, betas=(0.9, 0.95), weight_decay=0.05)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, steps, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A run may be resumed for more epochs, or on more devices: the schedule spans what is to be done now.
        for schedule in checkpoint["lr_schedulers"]:
            del schedule["total_steps"], schedule["_schedule_phases"]


def exact_image(pixels: Tensor, caption: str) -> wandb.Image:
    """A picture of uint8 (C, H, W) as it is, or of floats from 0 to 1: wandb alone would not scale these, but cut them
    to 0 and 1, which is black."""
    if pixels.is_floating_point():
        pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    return wandb.Image(pixels, caption=caption)


def top(samples: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """The k samples of the highest score, highest first; of equal ones the lower index, on however many devices."""
    by_index = samples["indices"].argsort()
    best = by_index[samples["score"][by_index].argsort(descending=True, stable=True)[:k]]
    return {name: tensor[best] for name, tensor in samples.items()}


class ImagePredictionLogger(pl.Callback):
    """Shows in W&B what goes into a classifier and what comes out, after every validation and test epoch.

    Logs, over `trainer.global_step`: `val/examples`, the same samples every time; `val/hardest`, those of the whole set
    with the highest loss, worst first; `val/recall/<class>`; `val/confusion_matrix`. After the test the same as
    `test/...`, and `test/predictions`, a table of the 200 hardest. When training raises, `train/last_batch`.

    To use it elsewhere, copy it with `exact_image` and `top`. It needs a WandbLogger (without one it does nothing), and
      * batches (inputs, labels int64 (N,), indices int64 (N,)): an index names a sample of the data set;
      * `validation_step` and `test_step` that return the logits (N, classes); for `train/last_batch`, a `training_step`
        that returns {"loss": loss, "logits": logits};
      * a LightningModule whose first layer with weights is given one row per sample.

    A picture is evidence of what the model really got: it is taken where that first layer receives it, after all that
    the data's way and `forward` did to it, and made pixels again by the LightningModule's `denormalize`, if it has one.
    These are the data set's own, byte for byte (not in bf16-true or 16-true, whose inputs are coarser). But what was
    transposed, blackened or normalised twice looks it.

    On many devices each rank keeps the candidates of its share, in memory that doesn't grow with the set, and rank zero
    logs the best of all: each sample once, also where a DistributedSampler pads the shares with duplicates.

    Args:
        num_samples: how many samples `examples` and `hardest` show.
        class_names: one per class; None: their numbers.
        to_media: makes a W&B value of a first layer's input, on the CPU, and a caption. For sounds, say:
            `lambda wave, caption: wandb.Audio(wave.numpy(), sample_rate=16000, caption=caption)`.
    """

    TABLE_ROWS = 200

    def __init__(self, num_samples: int = 32, class_names: Sequence[str] | None = None,
                 to_media: Callable[[Tensor, str], Any] = exact_image) -> None:
        self.num_samples, self.class_names, self.to_media = num_samples, class_names, to_media
        self.logger: WandbLogger | None = None
        self.warned = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.logger = next((logger for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
        if self.logger is None:
            if not self.warned:
                rank_zero_warn("ImagePredictionLogger does nothing: the Trainer has no WandbLogger")
            self.warned = True
            return
        self.train_batch: tuple[Tensor, Any, Tensor] | None = None
        self._reset()
        first = next(module for module in pl_module.modules() if list(module.parameters(recurse=False)))
        self.hook = first.register_forward_pre_hook(lambda _, args: setattr(self, "inputs", args[0].detach()))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.logger is not None:
            self.hook.remove()

    def _reset(self) -> None:
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.confusion: Tensor | int = 0
        self.seen = 0

    def _samples(self, logits: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        _, labels, indices = batch
        loss = F.cross_entropy(logits.float(), labels, reduction="none")
        return {"score": loss, "loss": loss, "inputs": self.inputs, "labels": labels, "indices": indices,
                "probabilities": logits.float().softmax(dim=1)}

    def _collect(self, logits: Tensor, batch: tuple[Tensor, Tensor, Tensor], dataloader: Any, hardest: int) -> None:
        """Merges a batch into what is kept, and forgets the rest of it."""
        if self.logger is None:
            return
        samples = self._samples(logits, batch)
        dataloader = dataloader[0] if isinstance(dataloader, (list, tuple)) else dataloader
        sampler = getattr(dataloader, "sampler", None)
        if isinstance(sampler, DistributedSampler):  # which begins anew where the data set ends
            position = sampler.rank + sampler.num_replicas * torch.arange(self.seen, self.seen + len(logits))
            samples = {name: tensor[position < len(sampler.dataset)] for name, tensor in samples.items()}
        self.seen += len(logits)
        predictions = samples["probabilities"].argmax(dim=1)
        self.confusion += multiclass_confusion_matrix(predictions, samples["labels"], num_classes=logits.shape[1])
        fixed = -(samples["indices"] * 2654435761 % 2**24).float()  # Knuth's hash: any choice, but always the same
        for group, k, score in (("examples", self.num_samples, fixed), ("hardest", hardest, samples["loss"])):
            new = {**samples, "score": score}
            if group not in self.kept:  # k rows from the start, so that every rank has as many to gather
                self.kept[group] = {name: tensor.new_zeros(k, *tensor.shape[1:]) for name, tensor in new.items()}
                self.kept[group]["score"] -= math.inf
            self.kept[group] = top({name: torch.cat([old, new[name]]) for name, old in self.kept[group].items()}, k)

    def _gather(self, pl_module: pl.LightningModule, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        """The best of all ranks, without the rows that no sample has filled."""
        all_ranks = {name: pl_module.all_gather(tensor).reshape(-1, *tensor.shape[1:]) for name, tensor in kept.items()}
        best = top(all_ranks, len(kept["score"]))
        return {name: tensor[best["score"] != -math.inf] for name, tensor in best.items()}

    def _name(self, label: Tensor) -> str:
        return self.class_names[label] if self.class_names else str(label.item())

    def _media(self, pl_module: pl.LightningModule, samples: dict[str, Tensor]) -> list[Any]:
        inputs = getattr(pl_module, "denormalize", lambda inputs: inputs)(samples["inputs"]).cpu()
        captions = [
            f"Pred: {self._name(row.argmax())} ({row.max():.0%}), Label: {self._name(label)} (#{index})"
            for row, label, index in zip(samples["probabilities"], samples["labels"], samples["indices"])
        ]
        return [self.to_media(sample, caption) for sample, caption in zip(inputs, captions)]

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.logger is None:
            return
        samples = {group: self._gather(pl_module, kept) for group, kept in self.kept.items()}
        confusion = trainer.strategy.reduce(self.confusion, reduce_op="sum")
        self._reset()
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        media = {group: self._media(pl_module, best) for group, best in samples.items()}
        values = {f"{stage}/{group}": pictures[: self.num_samples] for group, pictures in media.items()}
        names = [self._name(label) for label in torch.arange(len(confusion))]
        recall = confusion.diag() / confusion.sum(dim=1)
        values |= {f"{stage}/recall/{name}": r for name, r in zip(names, recall.tolist()) if not math.isnan(r)}
        # The chart of wandb.plot.confusion_matrix, which asks for every label and prediction of the set
        columns = ["Actual", "Predicted", "nPredictions"]
        counts = [[a, p, n] for a, row in zip(names, confusion.tolist()) for p, n in zip(names, row)]
        values[f"{stage}/confusion_matrix"] = wandb.plot_table(
            "wandb/confusion_matrix/v1", wandb.Table(columns, counts), {name: name for name in columns})
        if stage == "test":
            worst = samples["hardest"]
            rows = zip(worst["indices"].tolist(), media["hardest"], worst["labels"], worst["loss"].tolist(),
                       worst["probabilities"])
            values["test/predictions"] = wandb.Table(
                ["index", "image", "label", "prediction", "loss", *names],
                [[index, picture, self._name(label), self._name(row.argmax()), loss, *row.tolist()]
                 for index, picture, label, loss, row in rows])
        self.logger.log_metrics(values, step=trainer.global_step)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_) -> None:
        self._collect(outputs, batch, trainer.val_dataloaders, self.num_samples)

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, *_) -> None:
        self._collect(outputs, batch, trainer.test_dataloaders, max(self.num_samples, self.TABLE_ROWS))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._log(trainer, pl_module, "test")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, *_) -> None:
        if self.logger is not None and "logits" in outputs:
            self.train_batch = outputs["logits"], batch, self.inputs

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.logger is not None and self.train_batch and trainer.is_global_zero:  # alone: others may not answer
            logits, batch, self.inputs = self.train_batch
            last = top(self._samples(logits, batch), min(self.num_samples, len(logits)))
            self.logger.log_metrics({"train/last_batch": self._media(pl_module, last)}, step=trainer.global_step)


class StopAtBatchEnd(pl.Callback):
    """Ends training where all ranks can: at a batch's end, after a signal or when the loss isn't finite any more.

    Left to itself, Lightning raises KeyboardInterrupt wherever it happens to be, and ends a terminated run with 0.

    Raises:
        SystemExit: after SIGINT or SIGTERM, with 128 + its number; `interrupted.ckpt` is saved.
        FloatingPointError: at once; nothing is saved, since the weights are spoiled.
    """

    signal = 0

    def _listen(self, *_: Any) -> None:
        """Comes after Lightning has set its own handlers; when it ends, it puts back those that were there before."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: setattr(self, "signal", number))

    on_sanity_check_start = on_train_start = on_test_start = _listen

    def _on_any_rank(self, trainer: pl.Trainer, loss: Tensor) -> tuple[bool, bool]:
        flags = torch.stack([~loss.isfinite(), loss.new_tensor(self.signal) > 0]).float()
        return tuple((trainer.strategy.reduce(flags, reduce_op="sum") > 0).tolist())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        non_finite, stopped = self._on_any_rank(trainer, outputs["loss"])
        if non_finite or stopped:
            trainer.progress_bar_callback.on_train_end()  # else it draws itself again below our last line
        if non_finite:
            raise FloatingPointError(f"the loss is not finite at step {trainer.global_step}: try a smaller --lr")
        if stopped:
            trainer.save_checkpoint(Path(trainer.checkpoint_callback.dirpath, "interrupted.ckpt"))
            raise SystemExit(128 + (self.signal or signal.SIGTERM))

    def on_test_batch_end(self, trainer, pl_module, outputs, *_) -> None:
        if self._on_any_rank(trainer, outputs.new_zeros(()))[1]:
            raise SystemExit(128 + (self.signal or signal.SIGTERM))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's writes to the temporary folder, and if that is another disk, the file appears bit by bit."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        part = Path(f"{path}.part")
        try:
            super().save_checkpoint(checkpoint, part, storage_options)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"train.py: error: {' '.join(message.split())}\n" if rank_zero_only.rank == 0 else None)


def positive(number_type: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if not 0 < (number := number_type(text)) < math.inf:
            raise ValueError
        return number

    parse.__name__ = f"positive {number_type.__name__}"
    return parse


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser("train.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--gpus", type=int, help="short for --accelerator gpu --devices GPUS; 0: CPU, -1: all")
    add("--accelerator", help="cpu, gpu, tpu, mps or auto (default: auto)")
    add("--devices", help="how many, or which (0,1), or -1 for all, or auto (default: auto)")
    add("--strategy", default="auto", help="ddp, fsdp, ... (default: auto)")
    add("--num_nodes", type=positive(int), default=1, help="machines (default: 1)")
    add("--precision", default="32-true", help="32-true, 16-mixed, bf16-mixed, ... (default: 32-true)")
    add("--max_epochs", type=positive(int), default=5, help="passes over the training set (default: 5)")
    add("--fast_dev_run", action="store_true", help="one batch of everything; leaves no file (default: no)")
    add("--batch_size", type=positive(int), default=128, help="per device (default: 128)")
    add("--lr", type=positive(float), default=0.02, help="highest learning rate of the schedule (default: 0.02)")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (default: 0)")
    add("--dataset", choices=[*DATASETS, "digits"], help="(default: mnist, or digits where it can't be had)")
    add("--data_dir", default="data", help="where the data set is or will be downloaded (default: data)")
    add("--num_samples", type=positive(int), default=32, help="pictures in a panel of W&B (default: 32)")
    add("--ckpt_path", help="checkpoint to resume from (default: none)")
    add("--project", default=os.environ.get("WANDB_PROJECT", "lightning-digits"),
        help="W&B's project (default: WANDB_PROJECT or lightning-digits)")
    return parser


def make_trainer(args: argparse.Namespace) -> pl.Trainer:
    """Raises UserError for whatever the Trainer refuses: too many devices, an unknown strategy, ..."""
    accelerator, devices = args.accelerator or "auto", args.devices or "auto"
    if args.gpus is not None:
        if args.accelerator or args.devices:
            raise UserError("--gpus is short for --accelerator and --devices: give either, not both")
        accelerator, devices = ("gpu", args.gpus) if args.gpus else ("cpu", "auto")
    if not 0 <= args.seed < 2**31:
        raise UserError("--seed must be between 0 and 2147483647")
    if args.num_samples > wandb.Image.MAX_ITEMS:
        raise UserError(f"--num_samples must be at most {wandb.Image.MAX_ITEMS}: W&B drops the others")
    try:
        return pl.Trainer(
            accelerator=accelerator, devices=devices, strategy=args.strategy, num_nodes=args.num_nodes,
            precision=args.precision, max_epochs=args.max_epochs, fast_dev_run=args.fast_dev_run,
            callbacks=[ModelCheckpoint(monitor="val/loss"),
                       ModelCheckpoint(filename="last", enable_version_counter=False),
                       TQDMProgressBar(refresh_rate=20)],
            plugins=[AtomicCheckpointIO()], use_distributed_sampler=False, log_every_n_steps=10, logger=False,
        )
    except Exception as error:
        raise UserError(f"{error} (--help explains the flags; --gpus 0 trains on the CPU)") from error


def check_checkpoint(path: str, model: DigitClassifier, max_epochs: int) -> None:
    """Raises UserError unless it is a checkpoint of this model. Nothing in the file is executed."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        epochs_done = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        model.load_state_dict(checkpoint["state_dict"])
    except FileNotFoundError as error:
        raise UserError(f"--ckpt_path {path} does not exist: name a .ckpt file that a run has left") from error
    except Exception as error:
        raise UserError(f"--ckpt_path {path} is not a checkpoint of this model: name another file") from error
    if epochs_done > max_epochs:
        raise UserError(f"--ckpt_path {path} has {epochs_done} epochs behind it: raise --max_epochs")


def make_logger(args: argparse.Namespace, trainer: pl.Trainer) -> WandbLogger:
    """Starts the W&B run: online if there are credentials and the server answers, else offline. Never asks.

    Raises:
        UserError: W&B's folder can't be written; left to itself, wandb would record in the temporary folder.
    """

    def start(mode: str) -> wandb.Run:
        run = wandb.init(project=args.project, mode=mode, resume="allow")
        run.define_metric("trainer/global_step")  # one x-axis for metrics and pictures
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run

    if not trainer.is_global_zero:
        return WandbLogger(project=args.project, save_dir=None)
    settings = wandb.setup().settings
    try:
        Path(settings.wandb_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=settings.wandb_dir).close()
    except OSError as error:
        raise UserError(f"W&B's folder can't be written ({error}): set WANDB_DIR to another") from error
    try:
        mode = settings.mode or "online"
        run = start("offline" if mode == "online" and not wandb.login(prompt=False) else mode)
    except (wandb.errors.AuthenticationError, wandb.errors.CommError) as error:
        reason = " ".join(str(error).split())
        print(f"W&B can't be reached ({reason}): recording offline, nothing is lost; `wandb sync` uploads it later.")
        run = start("offline")
    return WandbLogger(project=args.project, save_dir=None, experiment=run)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, tests with the best checkpoint, and says where to look.

    Args:
        argv: the flags; None: those of the command line.

    Raises:
        SystemExit: 2 for what the user can mend, 1 for what breaks while running, 128 + N after signal N.
    """
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # a batch is one index: they would only cost
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # between Lightning and torch
    logging.raiseExceptions = False  # a full disk gets one line from us, not a traceback for each line of a log
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)  # hints at other products
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        trainer = make_trainer(args)
        pl.seed_everything(args.seed, verbose=False)
        model = DigitClassifier(**vars(args))
        if args.ckpt_path:
            check_checkpoint(args.ckpt_path, model, args.max_epochs)
        data = DigitsDataModule(args.dataset, args.data_dir, args.batch_size, args.seed, not args.fast_dev_run)
        if trainer.local_rank == 0:  # before there is a W&B run; Lightning would do it after that
            data.prepare_data()
        if not args.fast_dev_run:
            trainer.logger = make_logger(args, trainer)
    except (UserError, wandb.errors.UsageError) as error:
        parser.error(str(error))

    trainer.callbacks[:0] = [ImagePredictionLogger(args.num_samples, data.class_names), StopAtBatchEnd()]
    if trainer.loggers:
        trainer.callbacks.append(LearningRateMonitor("step"))
    status, error, handlers = 1, None, {}
    try:
        trainer.fit(model, data, ckpt_path=args.ckpt_path, weights_only=True)
        best = trainer.checkpoint_callback.best_model_path
        trainer.test(model, data, ckpt_path=best or None, weights_only=True)
        if best and wandb.run is not None:
            wandb.run.log_artifact(best, name=f"model-{wandb.run.id}", type="model", aliases=["best"])
        status = 0
    except (FloatingPointError, OSError) as exception:
        error = exception
    except SystemExit as exception:
        status = exception.code
        for number in (signal.SIGINT, signal.SIGTERM):  # launchers repeat them
            handlers[number] = signal.signal(number, signal.SIG_IGN)
    finally:
        run = wandb.run
        if run is not None:
            try:
                run.finish(exit_code=status)
            except OSError as exception:  # the disk is so full that W&B can't close its log
                status, error = status or 1, error or exception
    if run is not None:
        if error:
            print(f"train.py: error: {error}", file=sys.stderr)
        can_resume = status and not isinstance(error, FloatingPointError)
        say_where_to_look(trainer, run, (sys.argv[1:] if argv is None else argv) if can_resume else None)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if status and trainer.local_rank == 0:  # Lightning kills rank zero, wherever it is, when another rank fails
        sys.exit(status)


def say_where_to_look(trainer: pl.Trainer, run: wandb.Run, flags: Sequence[str] | None) -> None:
    """Prints how to see the run and where the checkpoint is; given the flags of a stopped run, how to resume it."""
    if not run.disabled:
        folder = os.path.relpath(Path(run.dir).parent)
        print(f"See the run: wandb leet {folder}" + ("" if run.offline else f"    or {run.url}"))
        print(f"Upload it: wandb sync {folder}" if run.offline else f"If the upload was cut short: wandb sync {folder}")
    best = trainer.checkpoint_callback.best_model_path
    folder = Path(trainer.checkpoint_callback.dirpath or Path(best).parent)
    checkpoints = sorted(folder.glob("*.ckpt"), key=os.path.getmtime)
    if checkpoints:
        print(f"Checkpoint: {os.path.relpath(best or checkpoints[-1])}")
    if checkpoints and flags is not None:
        flags = shlex.join([*flags, "--ckpt_path", os.path.relpath(checkpoints[-1])])
        print(f"Resume it: WANDB_RUN_ID={run.id} python train.py {flags}")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # all is written; Python would take 1.7 s to take down what torch has imported
