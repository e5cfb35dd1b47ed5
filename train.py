"""Train a CNN on digits with PyTorch Lightning, and see its mistakes in Weights & Biases.

python train.py                                  # on whatever this machine has: CPU, GPU or TPU
python train.py --gpus 1 --precision bf16-mixed  # on one GPU, or with --gpus 8 on eight
python train.py --fast_dev_run                   # a smoke test: one batch of everything
wandb leet wandb/latest-run                      # look at the run, without an account
"""

import argparse
import itertools
import math
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import wandb
from pytorch_lightning.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, random_split
from torchvision import datasets, transforms

DATASETS = {
    "mnist": datasets.MNIST,
    "fashion-mnist": datasets.FashionMNIST,
    "kmnist": datasets.KMNIST,
}
MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels, from 0 to 1


def load_dataset(name: str, data_dir: str, train: bool) -> TensorDataset:
    """Returns images, uint8 (N, 1, 28, 28), and labels, int64 (N,)."""
    if name == "digits":  # scikit-learn ships 1,797 of them, with 8 x 8 pixels from 0 to 16
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.tensor(digits.images * (255 / 16))[:, None]
        images = F.interpolate(pixels, size=28, mode="bilinear").round().byte()
        return TensorDataset(images, torch.tensor(digits.target))
    dataset = DATASETS[name](data_dir, train)
    return TensorDataset(dataset.data[:, None], dataset.targets)


class DigitsDataModule(pl.LightningDataModule):
    """Batches of normalised images, float (N, 1, 28, 28), and labels, int64 (N,).

    If no `dataset` is named, it is MNIST, or scikit-learn's digits where MNIST can't be had.
    """

    def __init__(self, dataset: str | None, data_dir: str, batch_size: int) -> None:
        super().__init__()
        self.dataset = dataset
        self.data_dir = data_dir
        self.batch_size = batch_size
        self.random_crop = transforms.RandomCrop(28, padding=1)
        self.normalize = transforms.Normalize(MEAN, STD)

    def has_mnist(self) -> bool:
        last_file = "MNIST/raw/t10k-labels-idx1-ubyte"
        return os.path.exists(os.path.join(self.data_dir, last_file))

    def prepare_data(self) -> None:
        """Downloads what is missing. Lightning calls this in one process on each machine."""
        if self.dataset == "digits":
            return
        try:
            DATASETS[self.dataset or "mnist"](self.data_dir, download=True)
        except (RuntimeError, OSError):
            if self.dataset is not None or self.has_mnist():  # then it is damaged
                raise
            print("MNIST can't be downloaded, so scikit-learn's digits take its place.")

    def setup(self, stage: str) -> None:
        """Splits the data in the same way for every seed."""
        name = self.dataset or ("mnist" if self.has_mnist() else "digits")
        self.dataset = self.trainer.strategy.broadcast(name)
        self.save_hyperparameters({"dataset": self.dataset})  # into W&B's config
        data = load_dataset(self.dataset, self.data_dir, train=True)
        generator = torch.Generator().manual_seed(0)
        if self.dataset == "digits":
            train, self.val, self.test = random_split(data, [1413, 128, 256], generator)
            self.train = Subset(train, list(range(1413)) * 8)  # an epoch takes each eight times
        else:
            self.train, self.val = random_split(data, [55_000, 5_000], generator)
            self.test = load_dataset(self.dataset, self.data_dir, train=False)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, self.batch_size)

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        """Crops training images and normalises all images, on the device."""
        images, labels = batch
        if self.trainer.training:
            images = self.random_crop(images)
        images = self.normalize(images / 255)
        return [self.trainer.precision_plugin.convert_input(images), labels]


class DigitClassifier(pl.LightningModule):
    """A small CNN in the shape of LeNet, with batch normalisation."""

    def __init__(self, lr: float = 0.015) -> None:
        super().__init__()
        self.save_hyperparameters()
        # fmt: off
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 5, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 128, 3, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Flatten(), nn.Linear(128 * 3 * 3, 10),
        )
        # fmt: on
        self.network.to(memory_format=torch.channels_last)  # twice as fast on a CPU

    def forward(self, images: Tensor) -> Tensor:
        """Takes normalised images, float (N, 1, 28, 28). Returns logits, float (N, 10)."""
        return self.network(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return self.log_metrics("train", self(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        self.log_metrics("val", logits, labels)
        return logits  # for ImagePredictionLogger

    def test_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        self.log_metrics("test", logits, labels)
        return logits  # for ImagePredictionLogger

    def log_metrics(self, stage: str, logits: Tensor, labels: Tensor) -> Tensor:
        """Logs loss and accuracy, for validation and test as means over the set. Returns the loss."""
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        metrics = {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels), sync_dist=stage != "train")
        return loss

    def configure_optimizers(self) -> dict:
        """The learning rate rises for 30 % of the steps, then falls to 0 (arXiv:1708.07120)."""
        optimizer = torch.optim.AdamW(
            self.parameters(), self.hparams.lr, betas=(0.9, 0.95), weight_decay=0.05
        )
        num_steps = self.trainer.estimated_stepping_batches

        def one_cycle(step: int) -> float:
            progress = min((step + 1) / num_steps, 1)  # a resumed run may take more steps
            if progress < 0.3:
                return progress / 0.3
            return 0.5 + 0.5 * math.cos(math.pi * (progress - 0.3) / 0.7)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, one_cycle)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ImagePredictionLogger(pl.Callback):
    """Shows in Weights & Biases which samples a classifier gets wrong.

    After each validation and test epoch it logs the samples with the highest loss ("hardest"), some
    that are always the same ("examples"), each class's recall, the lowest recall, and, for up to 100
    classes, a confusion matrix. Samples with a negative label are left out.

    Batches start with inputs (N, ...) and labels (N,). Steps return logits, float (N, classes), or
    (N, 1) for two classes, alone or as "logits" in a dict; otherwise `module(inputs)` returns them.
    Loaders don't shuffle: #12 is `loader.dataset[12]`, which is read, collated and transferred once
    more for its picture. A ValueError says what isn't so.

    Args:
        num_samples: Pictures in each of "hardest" and "examples". W&B shows up to 108.
        class_names: One for each class. By default, they are numbered.
        mean, std: What Normalize was given for each channel, to undo it.
        unpack: Takes inputs and labels out of a batch of another form.
        to_media: Makes one of W&B's media of an input and its `caption`. Inputs (C, H, W), or with
            more dimensions, come as uint8; others as they are, or as float32.
    """

    def __init__(
        self,
        num_samples: int = 32,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        unpack: Callable | None = None,
        to_media: Callable | None = None,
    ) -> None:
        self.num_samples = num_samples
        self.class_names = class_names
        self.mean, self.std = mean, std
        self.unpack = unpack
        self.to_media = to_media

    def on_validation_epoch_start(self, trainer, module):
        self.rows = defaultdict(list)  # for each loader, what `judge` returns for each batch

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        try:
            inputs, labels = self.split_batch(batch)
            logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
            is_float = isinstance(logits, Tensor) and logits.is_floating_point()
            if not is_float or logits.ndim != 2 or len(logits) != len(labels):
                with trainer.precision_plugin.val_step_context():
                    logits = module(inputs)
            self.rows[dataloader_idx].append(self.judge(logits, labels))
        except Exception as error:
            raise ValueError(
                "ImagePredictionLogger needs inputs and labels (N,) from the batch, or `unpack`, and"
                f" logits (N, classes) or (N, 1) from the step, or from `forward`: {error!r}"
            ) from error

    def on_validation_epoch_end(self, trainer, module):
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        for dataloader_idx, loader in enumerate(CombinedLoader(loaders).flattened):
            rows = self.gather_rows(trainer, loader, self.rows[dataloader_idx])
            if len(rows) > 0:
                self.log_panels(trainer, module, dataloader_idx, loader, rows)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def split_batch(self, batch: Any) -> tuple[Any, Tensor]:
        inputs, labels = self.unpack(batch) if self.unpack else batch[:2]
        return inputs, labels.reshape(len(labels))

    def judge(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns label, prediction, confidence and loss, float32 (N, 4), without waiting for them."""
        logits = logits.float()
        if logits.shape[1] == 1:
            logits = F.pad(logits, (1, 0))  # sigmoid(x) is the second value of softmax([0, x])
        else:  # rows that sum to one are probabilities, and softmax undoes the logarithm
            sums_are_one = ((logits.sum(dim=1) - 1).abs() < 0.01).all()
            logits = torch.where(sums_are_one & (logits >= 0).all(), logits.log(), logits)
        self.names = self.name_classes(logits.shape[1])
        labels = labels.clamp(min=-1)
        confidences, predictions = logits.softmax(dim=1).max(dim=1)
        losses = F.cross_entropy(logits, labels.long(), ignore_index=-1, reduction="none")
        return torch.stack([labels.float(), predictions.float(), confidences, losses], dim=1)

    def name_classes(self, count: int) -> list[str]:
        names = range(count) if self.class_names is None else self.class_names
        if len(names) != count:
            raise ValueError(f"there are {len(names)} class_names for {count} classes")
        are_distinct = len(set(names)) == count
        return [str(name) if are_distinct else f"{name} ({i})" for i, name in enumerate(names)]

    def gather_rows(self, trainer, loader, batches: list[Tensor]) -> np.ndarray:
        """Joins the rows of all processes, and puts each sample's index, or NaN, before its row.

        Returns float64 (N, 5), with each index once, and without negative labels.
        """
        indices = []
        if loader.batch_sampler is not None and not isinstance(loader.dataset, IterableDataset):
            for batch_indices in itertools.islice(loader.batch_sampler, len(batches)):
                indices.extend(batch_indices)
        rows = torch.cat(batches).cpu().numpy() if batches else np.empty((0, 4))
        if len(indices) != len(rows):
            indices = np.full(len(rows), np.nan)
        mine = np.column_stack([indices, rows])
        parts = [trainer.strategy.broadcast(mine, src=rank) for rank in range(trainer.world_size)]
        rows = np.concatenate(parts)
        _, first_places = np.unique(rows[:, 0], return_index=True, equal_nan=False)
        rows = rows[first_places]
        return rows[rows[:, 1] >= 0]

    def log_panels(self, trainer, module, dataloader_idx, loader, rows: np.ndarray) -> None:
        labels, predictions = rows[:, 1].astype(int), rows[:, 2].astype(int)
        if (labels != rows[:, 1]).any():
            raise ValueError("ImagePredictionLogger needs labels that are whole numbers")
        panels = {}
        for label in np.unique(labels):
            recall = np.mean(predictions[labels == label] == label).item()
            panels[f"recall/{self.names[label]}"] = recall
        stage = "test" if trainer.testing else "val"
        suffix = f"/dataloader_idx_{dataloader_idx}" if dataloader_idx > 0 else ""
        key = f"{stage}/lowest_recall{suffix}"  # Lightning logs it, and so completes W&B's row
        module.log(key, min(panels.values()), sync_dist=True, add_dataloader_idx=False)
        if not trainer.is_global_zero:
            return
        if len(self.names) <= 100:
            counted = labels.tolist(), predictions.tolist(), self.names
            panels["confusion_matrix"] = wandb.plot.confusion_matrix(None, *counted)
        if np.isnan(rows[:, 0]).any():
            rank_zero_warn("ImagePredictionLogger shows no pictures: the loader tells no indices.")
        else:
            hardest = np.argsort(-np.nan_to_num(rows[:, 4], nan=np.inf), kind="stable")
            mixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).numpy()
            for panel, order in {"hardest": hardest, "examples": mixed}.items():
                chosen = rows[order[: self.num_samples]]
                panels[panel] = [self.show(module, dataloader_idx, loader, row) for row in chosen]
        self.log_to_wandb(trainer, {f"{stage}/{key}{suffix}": panels[key] for key in panels})

    def show(self, module, dataloader_idx, loader, row: np.ndarray) -> Any:
        """Gets a sample in the way in which Lightning got its batch, and makes a picture of it."""
        index, label, prediction = row[:3].astype(int)
        collate = getattr(loader, "collate_fn", torch.utils.data.default_collate)
        batch = module.trainer.precision_plugin.convert_input(collate([loader.dataset[index]]))
        for owner in filter(None, (module, module.trainer.datamodule)):
            batch = owner.on_before_batch_transfer(batch, dataloader_idx)
        batch = module.trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
        inputs, labels = self.split_batch(batch)
        if labels.item() != label:
            raise ValueError("ImagePredictionLogger needs loaders that don't shuffle")
        predicted, labelled = self.names[prediction], self.names[label]
        caption = f"Pred: {predicted} ({row[3]:.0%}), Label: {labelled} (#{index})"
        picture = self.make_visible(inputs[0].cpu())
        if self.to_media is None and (picture.ndim != 3 or len(picture) not in (1, 3)):
            raise ValueError(f"ImagePredictionLogger: give to_media for {tuple(picture.shape)}")
        return (self.to_media or wandb.Image)(picture, caption=caption)

    def make_visible(self, picture: Tensor) -> Tensor:
        """Returns uint8 from 0 to 255, since W&B would cut floats off to 0 and 1: black."""
        is_float = picture.is_floating_point()
        if picture.ndim < 3:
            return picture.float() if is_float else picture  # NumPy has no bfloat16
        highest = 1 if is_float or picture.dtype == torch.bool else 255
        picture = picture.float().nan_to_num() / highest
        if is_float and self.mean is not None:
            mean, std = torch.tensor(self.mean), torch.tensor(self.std)
            picture = picture * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
        elif picture.min() < 0 or picture.max() > 1:
            rank_zero_warn(
                "ImagePredictionLogger stretches the values of pictures: give mean, std."
            )
            picture = picture - picture.min()
            picture = picture / picture.max().clamp(min=1e-9)
        return (picture.clamp(0, 1) * 255).round().byte()

    def log_to_wandb(self, trainer, panels: dict[str, Any]) -> None:
        runs = [logger.experiment for logger in trainer.loggers]
        run = next((run for run in runs if isinstance(run, wandb.Run)), None)
        if run is None and not trainer.fast_dev_run:
            rank_zero_warn("ImagePredictionLogger logs nothing: the Trainer has no WandbLogger.")
        if run is None or trainer.sanity_checking:
            return
        for key, panel in panels.items():
            try:
                run.log({key: panel}, commit=False)
            except wandb.errors.CommError as error:  # a chart waits for W&B's server
                rank_zero_warn(f"ImagePredictionLogger could not log {key}: {error}")


def positive_int(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise ValueError
    return number


def positive_float(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


def make_parser() -> argparse.ArgumentParser:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    add = parser.add_argument
    add("--gpus", type=int, help="short for --accelerator gpu --devices GPUS; 0 means the CPU")
    add("--accelerator", default="auto", help="cpu, gpu, tpu, mps or auto")
    add("--devices", default="auto", help="how many, or which, as in 0,1, or -1 for all")
    add("--strategy", default="auto", help="ddp, fsdp, ...")
    add("--num_nodes", type=positive_int, default=1, help="number of machines")
    add("--precision", default="32-true", help="32-true, 16-mixed, bf16-mixed, ...")
    add("--max_epochs", type=positive_int, default=5, help="passes over the training set")
    add("--fast_dev_run", action="store_true", help="one batch of everything; writes no file")
    add("--batch_size", type=positive_int, default=128, help="samples in a batch of one device")
    add("--lr", type=positive_float, default=0.015, help="highest learning rate of the schedule")
    add("--seed", type=int, default=0, help="for weights, order and random crops")
    add("--dataset", choices=[*DATASETS, "digits"], help="by default mnist, or else digits")
    add("--data_dir", default="data", help="where the data set is, or will be downloaded to")
    add("--num_samples", type=positive_int, default=32, help="pictures in a panel, up to 108")
    add("--ckpt_path", help="checkpoint to resume from")
    add("--project", default=os.environ.get("WANDB_PROJECT", "lightning-digits"), help="of W&B")
    return parser


def choose_wandb_mode() -> str | None:
    """Returns "offline" without an account or an answer, otherwise None: W&B's own settings."""
    if wandb.setup().settings.mode != "online":
        return None
    try:
        has_account = wandb.login(prompt=False)
    except wandb.errors.AuthenticationError as error:
        rank_zero_info(f"W&B can't be used online, so the run is recorded offline: {error}")
        return "offline"
    return None if has_account else "offline"


def make_trainer(args: argparse.Namespace) -> pl.Trainer:
    if args.gpus is not None:
        args.accelerator = "gpu" if args.gpus else "cpu"
        args.devices = args.gpus or "auto"
    has_names = args.dataset in ("fashion-mnist", "kmnist")
    class_names = DATASETS[args.dataset].classes if has_names else None
    mode = None if args.fast_dev_run else choose_wandb_mode()
    return pl.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=args.strategy,
        num_nodes=args.num_nodes,
        precision=args.precision,
        max_epochs=args.max_epochs,
        fast_dev_run=args.fast_dev_run,
        log_every_n_steps=10,
        logger=pl.loggers.WandbLogger(project=args.project, save_dir=None, mode=mode),
        callbacks=[
            ImagePredictionLogger(args.num_samples, class_names, [MEAN], [STD]),
            pl.callbacks.LearningRateMonitor(),
            pl.callbacks.TQDMProgressBar(refresh_rate=20),
            pl.callbacks.EarlyStopping("val/loss", patience=args.max_epochs),  # only if it is NaN
            pl.callbacks.ModelCheckpoint(monitor="val/loss"),
            pl.callbacks.ModelCheckpoint(filename="last", enable_version_counter=False),
        ],
    )


def main(argv: list[str] | None = None) -> None:
    """Trains, then tests with the checkpoint of the lowest validation loss."""
    parser = make_parser()
    args = parser.parse_args(argv)
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # seconds; W&B would wait for ever
    pl.seed_everything(args.seed, verbose=False)
    try:
        trainer = make_trainer(args)
        trainer.logger.log_hyperparams(vars(args))  # starts the run
    except Exception as error:
        parser.error(" ".join(str(error).split()))

    model = DigitClassifier(args.lr)
    dataset = args.dataset or ("digits" if args.fast_dev_run else None)
    data = DigitsDataModule(dataset, args.data_dir, args.batch_size)
    try:  # weights_only: nothing in a checkpoint is executed
        trainer.fit(model, data, ckpt_path=args.ckpt_path, weights_only=True)
        if not all(metric.isfinite() for metric in trainer.callback_metrics.values()):
            if trainer.is_global_zero:  # if others failed first, Lightning would kill this process
                raise FloatingPointError("the loss is not finite any more: try a lower --lr")
            return
        best_path = trainer.checkpoint_callback.best_model_path
        trainer.test(model, data, ckpt_path=best_path or None, weights_only=True)
        if best_path:
            with suppress(wandb.errors.CommError):  # the checkpoint is on the disk all the same
                trainer.logger.experiment.log_model(best_path, "digit-classifier", ["best"])
            trainer.print(f"The best checkpoint is {best_path}")
    except SIGTERMException:
        pass  # it would end the process with status 0
    if trainer.received_sigterm and trainer.is_global_zero:
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
