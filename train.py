"""Train a CNN on digits with PyTorch Lightning, and see its mistakes in Weights & Biases.

python train.py                                  # on whatever this machine has: CPU, GPU or TPU
python train.py --gpus 1 --precision bf16-mixed  # on one GPU, or with --gpus 8 on eight
wandb leet wandb/latest-run                      # look at the run, without an account
"""

import gc
import math
import os
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import wandb
from pytorch_lightning.utilities import CombinedLoader, rank_zero_warn
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split
from torchvision import transforms
from torchvision.datasets import KMNIST, MNIST, FashionMNIST

DATASETS = {"mnist": MNIST, "fashion-mnist": FashionMNIST, "kmnist": KMNIST}
CLASS_NAMES = {"fashion-mnist": FashionMNIST.classes, "kmnist": KMNIST.classes}
MEAN, STD = 0.1307, 0.3081  # of MNIST's pixels, from 0 to 1


def load_dataset(name: str, data_dir: str, train: bool) -> TensorDataset:
    """Returns images, uint8 (N, 1, 28, 28), and labels, int64 (N,)."""
    if name == "digits":  # scikit-learn ships 1,797 of them, with 8 x 8 pixels from 0 to 16
        from sklearn.datasets import load_digits

        pixels, labels = map(torch.tensor, load_digits(return_X_y=True))
        images = F.interpolate(pixels.view(-1, 1, 8, 8) * (255 / 16), size=28, mode="bilinear")
        return TensorDataset(images.round().byte(), labels)
    dataset = DATASETS[name](data_dir, train)
    return TensorDataset(dataset.data[:, None], dataset.targets)


class DigitsDataModule(pl.LightningDataModule):
    """Batches of normalised images, float (N, 1, 28, 28), and labels, int64 (N,).

    If no `dataset` is named, it is MNIST, or scikit-learn's digits where MNIST can't be had.
    """

    def __init__(self, dataset: str | None, data_dir: str, batch_size: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.mnist_file = os.path.join(data_dir, "MNIST/raw/t10k-labels-idx1-ubyte")  # comes last

    def prepare_data(self) -> None:
        """Downloads what is missing. Lightning calls this in one process on each machine."""
        name = self.hparams.dataset
        if name == "digits":
            return
        try:
            DATASETS[name or "mnist"](self.hparams.data_dir, download=True)
        except (RuntimeError, OSError):
            if name is not None or os.path.exists(self.mnist_file):  # then it is damaged
                raise
            print("MNIST can't be downloaded, so scikit-learn's digits take its place.")

    def setup(self, stage: str) -> None:
        """Splits the data in the same way for every seed."""
        name = self.hparams.dataset or ("mnist" if os.path.exists(self.mnist_file) else "digits")
        name = self.trainer.strategy.broadcast(name)
        self.save_hyperparameters({"dataset": name})  # into W&B's config, too
        data = load_dataset(name, self.hparams.data_dir, train=True)
        generator = torch.Generator().manual_seed(0)
        if name == "digits":
            train, self.val, self.test = random_split(data, [1413, 128, 256], generator)
            self.train = Subset(train, list(range(1413)) * 8)  # an epoch takes each eight times
        else:
            self.train, self.val = random_split(data, [55_000, 5_000], generator)
            self.test = load_dataset(name, self.hparams.data_dir, train=False)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.hparams.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.hparams.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, self.hparams.batch_size)

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        """Crops training images and normalises all images, on the device."""
        images, labels = batch
        if self.trainer.training:
            images = transforms.RandomCrop(28, padding=1)(images)
        images = transforms.functional.normalize(images / 255, [MEAN], [STD])
        return [self.trainer.precision_plugin.convert_input(images), labels]


class DigitClassifier(pl.LightningModule):
    """A small CNN in the shape of LeNet, with batch normalisation."""

    def __init__(self, lr: float = 0.015) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(
            nn.Conv2d(1, 16, 5, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 128, 3, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
            nn.Flatten(), nn.Linear(128 * 3 * 3, 10),
        )  # fmt: skip
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
        self.log_metrics("test" if self.trainer.testing else "val", logits, labels)
        return logits  # for ImagePredictionLogger

    test_step = validation_step

    def log_metrics(self, stage: str, logits: Tensor, labels: Tensor) -> Tensor:
        """Logs loss and accuracy, in validation and test as means over all. Returns the loss."""
        loss = F.cross_entropy(logits, labels)
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        metrics = {f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels), sync_dist=stage != "train")
        return loss

    def configure_optimizers(self) -> dict:
        """The learning rate rises for 30 % of the steps, then falls to 0 (arXiv:1708.07120)."""
        lr = self.hparams.lr
        optimizer = torch.optim.AdamW(self.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.05)
        num_steps = self.trainer.estimated_stepping_batches

        def one_cycle(step: int) -> float:
            progress = min((step + 1) / num_steps, 1)  # a resumed run may take more steps
            return min(progress / 0.3, 0.5 + 0.5 * math.cos(math.pi * (progress - 0.3) / 0.7))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, one_cycle)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


INDEX, LABEL, PREDICTION, CONFIDENCE, LOSS, SUM = range(6)  # the callback's columns


@dataclass(eq=False)
class ImagePredictionLogger(pl.Callback):
    """Shows in Weights & Biases which samples a classifier gets wrong.

    After each validation and test epoch it logs the samples with the highest loss ("hardest"), a
    fixed random set ("examples"), the recall of each class, the lowest recall and, for up to 100
    classes, a confusion matrix. Samples with a negative label are ignored.

    A batch begins with inputs (N, ...) and labels (N,). A step returns logits, float (N, classes)
    or (N, 1) for two classes, or a dict with the key "logits"; if not, `module(inputs)` is called.
    The loader must not shuffle: each picture is loaded again, as `dataset[index]`, collated and
    transferred. Its caption gives the index. Violations raise ValueError.

    Args:
        num_samples: Pictures per panel. W&B shows up to 108.
        class_names: One per class. By default, they are numbered.
        mean, std: The values per channel that were given to Normalize, to undo it.
        unpack: Takes a batch of another form, and returns its inputs and labels.
        to_media: Called as to_media(input, caption=...), returns W&B media. Images come as uint8.
    """

    num_samples: int = 32
    class_names: Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    unpack: Callable | None = None
    to_media: Callable | None = None

    def on_validation_epoch_start(self, trainer, module):
        self.rows = defaultdict(list)  # for each loader, a tensor (N, 6) per batch
        self.names = {}  # for each loader, the names of its classes

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        try:
            inputs, labels = self.split_batch(batch)
            logits = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
            is_float = isinstance(logits, Tensor) and logits.is_floating_point()
            if not is_float or logits.ndim != 2 or len(logits) != len(labels):
                with trainer.precision_plugin.val_step_context():  # such as autocast
                    logits = module(inputs)
            if logits.shape[1] == 1:
                logits = F.pad(logits, (1, 0))  # sigmoid(x) is the second value of softmax([0, x])
            self.names[dataloader_idx] = self.name_classes(logits.shape[1])
            self.rows[dataloader_idx].append(self.judge(logits.float(), labels))
        except Exception as error:
            needs = "labels (N,) from batch or unpack, logits (N, classes) or (N, 1) from the step"
            raise ValueError(f"ImagePredictionLogger needs {needs}, but: {error!r}") from error

    def on_validation_epoch_end(self, trainer, module):
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        for dataloader_idx, loader in enumerate(CombinedLoader(loaders).flattened):  # list or dict
            rows = self.gather_rows(trainer, loader, self.rows[dataloader_idx])
            if len(rows) > 0:
                self.log_panels(trainer, module, dataloader_idx, loader, rows)

    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end

    def split_batch(self, batch) -> tuple:
        inputs, labels = self.unpack(batch) if self.unpack else batch[:2]
        return inputs, labels.reshape(len(labels))  # (N, 1) becomes (N,)

    def name_classes(self, count: int) -> list[str]:
        names = range(count) if self.class_names is None else self.class_names
        if len(names) != count:
            raise ValueError(f"got {len(names)} class_names for {count} classes")
        are_distinct = len(set(names)) == count
        return [str(name) if are_distinct else f"{name} ({i})" for i, name in enumerate(names)]

    def judge(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the columns, float32 (N, 6), without waiting for the device."""
        confidences, predictions = logits.softmax(dim=1).max(dim=1)
        losses = F.cross_entropy(logits, labels.long().clamp(-1), ignore_index=-1, reduction="none")
        unknown = torch.full_like(losses, torch.nan)
        columns = unknown, labels, predictions, confidences, losses, logits.sum(dim=1)
        return torch.stack([column.float() for column in columns], dim=1)

    def gather_rows(self, trainer, loader, batches: list[Tensor]) -> np.ndarray:
        """Joins the rows of all processes, one per sample, with its index where that is known."""
        rows = torch.cat(batches).cpu().double().numpy() if batches else np.empty((0, 6))
        indices = []
        if getattr(loader, "batch_sampler", None) is not None:
            for _, batch_indices in zip(batches, loader.batch_sampler, strict=False):
                indices.extend(batch_indices)  # a sampler repeats its order if it doesn't shuffle
        if len(indices) == len(rows):
            rows[:, INDEX] = indices
        parts = [trainer.strategy.broadcast(rows, src=rank) for rank in range(trainer.world_size)]
        rows = np.concatenate(parts)  # the parts may differ in length
        _, first = np.unique(rows[:, INDEX], return_index=True, equal_nan=False)
        return rows[first[rows[first, LABEL] >= 0]]  # a DistributedSampler repeats some samples

    def log_panels(self, trainer, module, dataloader_idx, loader, rows: np.ndarray) -> None:
        labels, predictions = rows[:, LABEL].astype(int), rows[:, PREDICTION].astype(int)
        if (labels != rows[:, LABEL]).any() or np.allclose(rows[:, SUM], 1, atol=0.01):
            raise ValueError("ImagePredictionLogger needs integer labels; logits, no probabilities")
        names, panels = self.names[dataloader_idx], {}
        for label in np.unique(labels):
            panels[f"recall/{names[label]}"] = np.mean(predictions[labels == label] == label)
        stage = "test" if trainer.testing else "val"
        suffix = f"/dataloader_idx_{dataloader_idx}" if dataloader_idx > 0 else ""
        # Lightning logs this with its own metrics, and so commits our panels to the same row.
        key = f"{stage}/lowest_recall{suffix}"
        module.log(key, min(panels.values()), sync_dist=True, add_dataloader_idx=False)
        if not trainer.is_global_zero:
            return
        if len(names) <= 100:
            counted = labels.tolist(), predictions.tolist(), names
            panels["confusion_matrix"] = wandb.plot.confusion_matrix(None, *counted)
        if np.isnan(rows[:, INDEX]).any():
            rank_zero_warn("ImagePredictionLogger shows no pictures: their indices are unknown.")
        else:
            hardest = np.argsort(-np.nan_to_num(rows[:, LOSS], nan=np.inf), kind="stable")
            mixed = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).numpy()
            for panel, order in {"hardest": hardest, "examples": mixed}.items():
                chosen = rows[order[: self.num_samples]]
                panels[panel] = [self.show(module, dataloader_idx, loader, row) for row in chosen]
        self.log_to_wandb(trainer, {f"{stage}/{key}{suffix}": panels[key] for key in panels})

    def show(self, module, dataloader_idx, loader, row: np.ndarray):
        """Loads a sample with the same steps as Lightning's evaluation loop, and renders it."""
        index, label, prediction = row[[INDEX, LABEL, PREDICTION]].astype(int)
        collate = getattr(loader, "collate_fn", torch.utils.data.default_collate)  # none on TPUs
        batch = module.trainer.precision_plugin.convert_input(collate([loader.dataset[index]]))
        for owner in filter(None, (module, module.trainer.datamodule)):
            batch = owner.on_before_batch_transfer(batch, dataloader_idx)
        batch = module.trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
        inputs, labels = self.split_batch(batch)
        if labels.item() != label:
            raise ValueError("ImagePredictionLogger needs loaders that don't shuffle")
        names = self.names[dataloader_idx]
        predicted, labelled = names[prediction], names[label]
        caption = f"Pred: {predicted} ({row[CONFIDENCE]:.0%}), Label: {labelled} (#{index})"
        picture = self.make_visible(inputs[0].cpu())
        if self.to_media is None and (picture.ndim != 3 or len(picture) not in (1, 3)):
            raise ValueError(f"ImagePredictionLogger needs to_media for {tuple(picture.shape)}")
        return (self.to_media or wandb.Image)(picture, caption=caption)

    def make_visible(self, picture: Tensor) -> Tensor:
        """Converts images to uint8, since `wandb.Image` would turn 0.9 into 0, which is black."""
        is_float = picture.is_floating_point()
        if picture.ndim < 3:
            return picture.float() if is_float else picture  # no image; NumPy has no bfloat16
        highest = 1 if is_float or picture.dtype == torch.bool else 255
        picture = picture.float().nan_to_num() / highest
        if is_float and self.mean is not None:
            mean, std = torch.tensor(self.mean), torch.tensor(self.std)
            picture = picture * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
        elif picture.min() < 0 or picture.max() > 1:
            rank_zero_warn("ImagePredictionLogger stretches pictures; does it need mean and std?")
            picture = picture - picture.min()
            picture = picture / picture.max().clamp(min=1e-9)
        return (picture.clamp(0, 1) * 255).round().byte()

    def log_to_wandb(self, trainer, panels: dict) -> None:
        runs = [logger.experiment for logger in trainer.loggers]
        run = next((run for run in runs if isinstance(run, wandb.Run)), None)
        if run is None and not trainer.fast_dev_run:
            rank_zero_warn("ImagePredictionLogger logs nothing: the Trainer has no WandbLogger.")
        if run is None or trainer.sanity_checking:  # which has found errors early
            return
        for key, panel in panels.items():
            try:
                run.log({key: panel}, commit=False)
            except wandb.errors.CommError as error:  # charts need W&B's server
                rank_zero_warn(f"ImagePredictionLogger could not log {key}: {error}")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(usage=SUPPRESS, formatter_class=ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--gpus", type=int, help="short for --accelerator gpu --devices GPUS; 0 means the CPU")
    add("--accelerator", default="auto", help="cpu, gpu, tpu, mps or auto")
    add("--devices", default="auto", help="how many, or which, as in 0,1, or -1 for all")
    add("--strategy", default="auto", help="ddp, fsdp, ...")
    add("--num_nodes", type=int, default=1, help="number of machines")
    add("--precision", default="32-true", help="32-true, 16-mixed, bf16-mixed, ...")
    add("--max_epochs", type=int, default=5, help="passes over the training set")
    add("--fast_dev_run", action="store_true", help="one batch of everything; writes no file")
    add("--batch_size", type=int, default=128, help="samples in a batch of one device")
    add("--lr", type=float, default=0.015, help="highest learning rate of the schedule")
    add("--seed", type=int, default=0, help="for weights, order and random crops")
    add("--dataset", choices=[*DATASETS, "digits"], help="by default mnist, or else digits")
    add("--data_dir", default="data", help="where the data set is, or will be downloaded to")
    add("--num_samples", type=int, default=32, help="pictures in a panel, up to 108")
    add("--ckpt_path", help="checkpoint to resume from")
    add("--project", default=os.environ.get("WANDB_PROJECT", "lightning-digits"), help="in W&B")
    return parser


def choose_wandb_mode() -> str | None:
    """Returns "offline" without an account or an answer, else None: W&B's own settings."""
    with suppress(wandb.errors.AuthenticationError):
        if wandb.setup().settings.mode != "online" or wandb.login(prompt=False):
            return None
    return "offline"


def make_trainer(args: Namespace) -> pl.Trainer:
    if args.gpus is not None:
        args.accelerator, args.devices = ("gpu", args.gpus) if args.gpus else ("cpu", "auto")
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", "60")  # seconds; W&B would wait for ever
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
            ImagePredictionLogger(args.num_samples, CLASS_NAMES.get(args.dataset), [MEAN], [STD]),
            pl.callbacks.LearningRateMonitor(),
            pl.callbacks.TQDMProgressBar(refresh_rate=20),
            pl.callbacks.EarlyStopping("val/loss", patience=1_000_000),  # stops only at NaN
            pl.callbacks.ModelCheckpoint(monitor="val/loss"),
            pl.callbacks.ModelCheckpoint(filename="last", enable_version_counter=False),
        ],
    )


def main(argv: list[str] | None = None) -> None:
    """Trains, then tests with the checkpoint of the lowest validation loss."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if not min(args.lr, args.num_nodes, args.max_epochs, args.batch_size, args.num_samples) > 0:
        parser.error("lr, num_nodes, max_epochs, batch_size and num_samples must be positive")
    pl.seed_everything(args.seed, verbose=False)
    try:
        trainer = make_trainer(args)
        trainer.logger.log_hyperparams(vars(args))  # starts the run
    except Exception as error:
        parser.error(" ".join(str(error).split()))
    model = DigitClassifier(args.lr)
    dataset = args.dataset or ("digits" if args.fast_dev_run else None)
    data = DigitsDataModule(dataset, args.data_dir, args.batch_size)
    status = 1
    try:  # weights_only: nothing in a checkpoint is executed
        trainer.fit(model, data, ckpt_path=args.ckpt_path, weights_only=True)
        if not all(metric.isfinite() for metric in trainer.callback_metrics.values()):
            if not trainer.is_global_zero:
                return  # with status 0, or Lightning would kill the first process before it ends
            raise FloatingPointError("the loss is not finite any more: try a lower --lr")
        best_path = trainer.checkpoint_callback.best_model_path
        trainer.test(model, data, ckpt_path=best_path or None, weights_only=True)
        with suppress(wandb.errors.CommError):  # the checkpoint is on the disk all the same
            trainer.logger.experiment.log_model(best_path, "digit-classifier", ["best"])
        trainer.print(f"Checkpoint: {best_path or 'none, in a fast_dev_run'}")
        status = 143 if trainer.received_sigterm else 0
    except (Exception, SIGTERMException):  # after SIGTERM, Lightning would end with status 0
        if not trainer.received_sigterm:
            raise
        status = 143
    finally:
        wandb.finish(exit_code=status)
    if status != 0 and trainer.is_global_zero:
        raise SystemExit(status)


if __name__ == "__main__":
    gc.freeze()  # or Python would search all of PyTorch for garbage at its end, for a second
    main()
