"""Classification data sets: folders of images, arrays, and the categories in a COCO annotation file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.logging import print_log
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from kd_plugins.classification.sample import ClassSample
from kd_plugins.classification.transforms import build_transform
from kd_plugins.errors import DistillError, nearest
from kd_plugins.extras import how_to_install
from kd_plugins.registry import DATASETS

#: As torchvision's ImageFolder.
EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')
_SPLITS = {'train', 'training', 'val', 'valid', 'validation', 'test', 'testing'}
_MODES = {1: 'L', 3: 'RGB'}


class _Images(Dataset):
    """What every data set here has in common; subclasses say where image ``i`` comes from.

    `metainfo`, `full_init`, `get_data_info` and `get_cat_ids` are what MMEngine's wrappers (RepeatDataset,
    ConcatDataset, ClassBalancedDataset) ask of a data set.

    Args:
        labels: ``(N,)`` class numbers, or ``(N, C)`` zeros and ones.
        classes: Their names.
        transform: See `build_transform`.
        in_chans: 3 for RGB, 1 for grey.
    """

    def __init__(self, labels: np.ndarray, classes: Sequence[str], transform: Any, in_chans: int) -> None:
        if in_chans not in _MODES or isinstance(in_chans, bool):
            raise DistillError(f'in_chans must be 3 (RGB) or 1 (grey), got {in_chans!r}.')
        self._classes = tuple(classes)
        self.transform = build_transform(transform, in_chans)
        self._mode = _MODES[in_chans]
        self._labels = labels

    @property
    def metainfo(self) -> dict[str, Any]:
        """``dict(classes=<names>)``, a new one every time: mmdet's ConcatDataset writes into it."""
        return dict(classes=self._classes)

    def full_init(self) -> None:
        """Nothing: the labels are there from the beginning."""

    def get_data_info(self, index: int) -> dict[str, Any]:
        """What is known of an image without reading it.

        Args:
            index: Of the image.

        Returns:
            ``dict(img_path=<name>, gt_label=<class, or list of classes>, sample_idx=index)``.
        """
        index = range(len(self))[index]
        found = self.get_cat_ids(index)
        label = found[0] if self._labels.ndim == 1 else found
        return dict(img_path=self._name(index), gt_label=label, sample_idx=index)

    def get_cat_ids(self, index: int) -> list[int]:
        """The classes of an image; one, or with several labels per image any number."""
        label = self._labels[index]
        return [int(label)] if self._labels.ndim == 1 else np.flatnonzero(label).tolist()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``dict(inputs=(in_chans, H, W) uint8 tensor, data_samples=ClassSample)``.

        Raises:
            DistillError: The image cannot be read or transformed; it is named.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f'image {index} of {len(self)}')
        image, index = self._image(index % len(self))
        name = self._name(index)
        try:
            inputs = self.transform(image)
        except DistillError as error:
            raise DistillError(f'{name}: {error}') from error
        except (ValueError, TypeError, RuntimeError) as error:
            width, height = image.size
            raise DistillError(f'The transform fails on {name} ({width} x {height} pixels): {error}') from error
        sample = ClassSample(metainfo=dict(img_path=name, img_shape=tuple(inputs.shape[-2:])))
        sample.gt_label = self._label(index)
        return dict(inputs=inputs, data_samples=sample)

    def _label(self, index: int) -> Tensor:
        return torch.tensor(self._labels[index], dtype=torch.long if self._labels.ndim == 1 else torch.float32)

    def _name(self, index: int) -> str:
        raise NotImplementedError

    def _image(self, index: int) -> tuple[Image.Image, int]:
        """The image, and the index that it really has."""
        raise NotImplementedError


class _Files(_Images):
    """Images in files.

    Args:
        folder: What the file names are relative to.
        files: Their names.
        labels: See `_Images`, as are ``classes``, ``transform`` and ``in_chans``.
        on_corrupt: ``'raise'`` or ``'skip'``.
    """

    def __init__(
        self, folder: str, files: Sequence[str], labels: np.ndarray, on_corrupt: str = 'raise', **options: Any
    ) -> None:
        super().__init__(labels, **options)
        if on_corrupt not in ('raise', 'skip'):
            raise DistillError(f'on_corrupt cannot be {on_corrupt!r}: {nearest(on_corrupt, ("raise", "skip"))}')
        self._folder, self._on_corrupt = folder, on_corrupt
        # One array instead of a million strings: workers share its memory instead of copying it, count by count.
        self._files = np.array([os.fsencode(f) for f in files])
        self._warned: set[int] = set()

    def _name(self, index: int) -> str:
        return os.path.join(self._folder, os.fsdecode(self._files[index]))

    def _image(self, index: int) -> tuple[Image.Image, int]:
        if self._on_corrupt == 'raise':
            try:
                return _read(self._name(index), self._mode), index
            except _Unreadable as error:
                raise DistillError(
                    f"{error}; replace or delete the file, or write on_corrupt='skip' in the data set to go on with "
                    'another image in its place.'
                ) from error
        for step in range(len(self)):
            i = (index + step) % len(self)
            try:
                return _read(self._name(i), self._mode), i
            except _Unreadable as error:
                if i not in self._warned:
                    self._warned.add(i)
                    print_log(f'{error}; the next image takes its place.', 'current', logging.WARNING)
        raise DistillError(f'None of the {len(self)} images in {self._folder!r} can be read.')


class _Unreadable(Exception):
    """A file that is no image, or not a whole one."""


def _read(path: str, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            depth = image.mode
            converted = image.convert(mode)
    except Exception as error:  # on broken files, decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise _Unreadable(f'Image {path} cannot be read ({type(error).__name__}: {error})') from error
    if depth.startswith(('I', 'F')):
        raise DistillError(
            f'Image {path} has more than 8 bits per channel (mode {depth}), which a conversion would clip to white; '
            'scale the images to 8 bits first.'
        )
    return converted


@DATASETS.register_module()
class ImageFolder(_Files):
    """Images in one folder per class: ``root/[split/]<class>/**/<image>``.

    Classes are numbered in plain alphabetical order (``'10'`` before ``'2'``), like torchvision and Ultralytics do, so
    that a number means the same class to every teacher; the listing is torchvision's own, because timm's readers sort
    naturally (``'2'`` before ``'10'``). Greyscale, palette, RGBA and CMYK files are converted.

    Args:
        root: The data set's folder.
        split: Folder below it, e.g. ``'train'``.
        classes: Class names in order. Default: the folders of ``root/train`` when ``split`` is given and that exists,
            so that all splits number alike even if one has no image of a class; otherwise the own folders.
        transform: See `build_transform`.
        in_chans: 3 converts images to RGB, 1 to grey.
        on_corrupt: ``'raise'``: an unreadable or truncated file ends the run, and is named. ``'skip'``: the next
            readable image takes its place, with its own label, and the file is named in a warning once per process;
            in a validation set that image then counts twice.
        extensions: Of the files that are images.

    Attributes:
        metainfo: ``dict(classes=<names>)``.

    Raises:
        DistillError: A folder is missing (near names are given), holds no image, or is of no known class; torchvision
            is not installed.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str | None = None,
        classes: Sequence[str] | None = None,
        transform: Any = None,
        in_chans: int = 3,
        on_corrupt: str = 'raise',
        extensions: Sequence[str] = EXTENSIONS,
    ) -> None:
        try:
            from torchvision.datasets.folder import make_dataset
        except ImportError as error:
            raise DistillError(
                f'ImageFolder needs torchvision, which cannot be imported ({error}); {how_to_install("timm")}.'
            ) from error
        root = _folder(root, 'root')
        folder = root if split is None else _folder(os.path.join(root, split), 'split')
        own = _subfolders(folder)
        if split is None and 'train' in own and set(own) <= _SPLITS:
            raise DistillError(f"{root} holds splits, not classes: write split='train' or split='val'.")
        if classes is None:
            train = os.path.join(root, 'train')
            known = _subfolders(train) if split is not None and os.path.isdir(train) else own
            source = f'the folders of {train}' if known is not own else 'its folders'
        else:
            known, source = _class_names(classes), 'those of the option classes'
        _refuse_unknown(folder, own, known, source)
        if isinstance(extensions, str):
            extensions = (extensions,)
        pairs = []
        if known:
            numbers = {name: i for i, name in enumerate(known)}
            suffixes = tuple(e.lower() for e in extensions)
            pairs = make_dataset(folder, numbers, extensions=suffixes, allow_empty=True)
        if not pairs:
            raise DistillError(
                f'{folder} holds no images: expected <class>/<name> with one of {", ".join(extensions)}.'
            )
        super().__init__(
            folder,
            [os.path.relpath(path, folder) for path, _ in pairs],
            np.array([label for _, label in pairs]),
            on_corrupt,
            classes=known,
            transform=transform,
            in_chans=in_chans,
        )


def _refuse_unknown(folder: str, own: Sequence[str], known: Sequence[str], source: str) -> None:
    unknown = sorted(set(own) - set(known))
    if unknown:
        shown = ', '.join(map(repr, unknown[:5])) + (' ...' if len(unknown) > 5 else '')
        raise DistillError(
            f'{folder} has folders of no known class: {shown}; the classes are {source}: {nearest(unknown[0], known)}'
        )


@DATASETS.register_module()
class CocoMultiLabel(_Files):
    """Which categories occur in each image of a COCO annotation file: a multi-label data set.

    The file is read as plain JSON: three of its lists are all that is needed, and pycocotools would index every mask
    and print to the terminal. Crowd annotations count like others; images without annotations have no label set.

    Args:
        root: The data set's folder.
        ann_file: The annotation file, relative to ``root`` (or absolute).
        img_prefix: Folder of the images, likewise.
        classes: Names of the categories to label, in order; others are ignored. Default: all, by ascending id.
        transform: See `build_transform`.
        in_chans: 3 converts images to RGB, 1 to grey.
        on_corrupt: See `ImageFolder`.

    Attributes:
        metainfo: ``dict(classes=<names>)``.

    Raises:
        DistillError: A file or folder is missing (near names are given), the file is no COCO annotation, or it has no
            such category.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        ann_file: str,
        img_prefix: str,
        classes: Sequence[str] | None = None,
        transform: Any = None,
        in_chans: int = 3,
        on_corrupt: str = 'raise',
    ) -> None:
        root = _folder(root, 'root')
        folder = _folder(os.path.join(root, img_prefix), 'img_prefix')
        path = _file(os.path.join(root, ann_file), 'ann_file')
        names, files, labels = _coco_labels(path, None if classes is None else _class_names(classes))
        first = os.path.join(folder, files[0])
        if not os.path.isfile(first):
            raise DistillError(
                f'{first}, the first image of {path}, does not exist: is img_prefix={img_prefix!r} right?'
            )
        super().__init__(folder, files, labels, on_corrupt, classes=names, transform=transform, in_chans=in_chans)


def _coco_labels(path: str, classes: list[str] | None) -> tuple[list[str], list[str], np.ndarray]:
    """Class names, file names and ``(N, C)`` uint8 labels of an annotation file."""
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        categories = {c['id']: c['name'] for c in sorted(content['categories'], key=lambda c: c['id'])}
        files = {image['id']: image['file_name'] for image in content['images']}
        pairs = [(a['image_id'], a['category_id']) for a in content['annotations']]
    except (ValueError, KeyError, TypeError) as error:
        raise DistillError(
            f'ann_file {path} is no COCO annotation file with images, annotations and categories '
            f'({type(error).__name__}: {error}).'
        ) from error
    names = _class_names(list(categories.values())) if classes is None else classes
    for name in names:
        if name not in categories.values():
            raise DistillError(f'{path} has no category {name!r}: {nearest(name, categories.values())}')
    if not files:
        raise DistillError(f'ann_file {path} lists no images.')
    columns = {id_: names.index(name) for id_, name in categories.items() if name in names}
    rows = {id_: i for i, id_ in enumerate(files)}
    labels = np.zeros((len(files), len(names)), np.uint8)
    for image, category in pairs:
        if image not in rows or category not in categories:
            raise DistillError(
                f'{path} annotates image {image!r} with category {category!r}: one of them is not listed.'
            )
        if category in columns:
            labels[rows[image], columns[category]] = 1
    return names, list(files.values()), labels


@DATASETS.register_module()
class ArrayDataset(_Images):
    """Images and labels that are arrays.

    Args:
        images: uint8 ``(N, H, W, 3)`` RGB, ``(N, H, W, 1)`` or ``(N, H, W)`` grey: an array, a ``.npy`` file (read
            piece by piece, it may be larger than the memory) or a ``.npz`` file: the only array in it, the one called
            ``images``, or another as ``'file.npz:x_train'``.
        labels: ``(N,)`` whole numbers, or ``(N, C)`` zeros and ones for several labels per image; likewise (in a
            ``.npz`` called ``labels``).
        classes: Class names. Default: the numbers up to the greatest label; give them when a split might lack the last
            class.
        transform: See `build_transform`.
        in_chans: 3 converts images to RGB, 1 to grey.

    Attributes:
        metainfo: ``dict(classes=<names>)``.

    Raises:
        DistillError: A file is missing, or an array has another shape, type or range.
    """

    def __init__(
        self,
        images: np.ndarray | str | os.PathLike,
        labels: np.ndarray | Sequence[int] | str | os.PathLike,
        classes: Sequence[str] | None = None,
        transform: Any = None,
        in_chans: int = 3,
    ) -> None:
        self._images = _check_images(_array(images, 'images'))
        self._source = os.fspath(images) if isinstance(images, (str, os.PathLike)) else 'images'
        labels = _check_labels(_array(labels, 'labels'))
        if len(labels) != len(self._images):
            raise DistillError(f'There are {len(self._images)} images and {len(labels)} labels; give one for each.')
        count = labels.shape[1] if labels.ndim == 2 else int(labels.max()) + 1
        names = [str(i) for i in range(count)] if classes is None else _class_names(classes)
        if count > len(names) or (labels.ndim == 2 and count != len(names)):
            raise DistillError(
                f'classes has {len(names)} names, but '
                + (f'labels has {count} columns.' if labels.ndim == 2 else f'the greatest label is {count - 1}.')
            )
        super().__init__(labels, names, transform, in_chans)

    def _name(self, index: int) -> str:
        return f'{self._source}[{index}]'

    def _image(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(np.ascontiguousarray(self._images[index])).convert(self._mode), index


def _array(value: Any, name: str) -> np.ndarray:
    """An array from a file, or what was given as one."""
    if not isinstance(value, (str, os.PathLike)):
        return np.asarray(value)
    path, key = os.fspath(value), None
    if '.npz:' in path:
        path, _, key = path.rpartition(':')
    path = _file(path, name)
    try:
        content = np.load(path, mmap_mode='r', allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DistillError(f'{name}: {path} is no .npy or .npz file of plain arrays ({error}).') from error
    if isinstance(content, np.ndarray):
        return content
    with content:
        if key is None:
            key = content.files[0] if len(content.files) == 1 else name
        if key not in content.files:
            raise DistillError(
                f'{name}: {path} has no array {key!r}: {nearest(key, content.files)} Write {name}="{path}:<name>".'
            )
        return content[key]


def _check_images(images: np.ndarray) -> np.ndarray:
    if images.dtype != np.uint8:
        scaled = np.issubdtype(images.dtype, np.floating) and images.size and float(np.max(images[:1])) <= 1
        advice = '(255 * images).round().astype("uint8")' if scaled else 'images.astype("uint8")'
        raise DistillError(f'images must be uint8 pixels from 0 to 255, not {images.dtype}; convert with {advice}.')
    if images.ndim == 4 and images.shape[-1] not in (1, 3) and images.shape[1] in (1, 3):
        raise DistillError(f'images of {images.shape} have their channels first; give images.transpose(0, 2, 3, 1).')
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        raise DistillError(f'images must be (N, H, W, 3), (N, H, W, 1) or (N, H, W), not {images.shape}.')
    if 0 in images.shape:
        raise DistillError(f'images is empty: {images.shape}.')
    return images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images


def _check_labels(labels: np.ndarray) -> np.ndarray:
    if labels.ndim == 2 and labels.dtype.kind in 'biuf' and labels.size:
        wrong = labels[(labels != 0) & (labels != 1)]
        if len(wrong):
            raise DistillError(
                f'labels of {labels.shape} are several per image and must be 0 or 1, but hold {wrong[0]}; one class '
                'number per image is (N,): labels.reshape(-1).'
            )
        return labels.astype(np.uint8)
    if labels.ndim != 1 or labels.dtype.kind not in 'iu' or not labels.size:
        raise DistillError(
            f'labels must be whole numbers (N,), or zeros and ones (N, C), not {labels.dtype} {labels.shape}.'
        )
    if labels.min() < 0:
        first = int(np.flatnonzero(labels < 0)[0])
        raise DistillError(f'labels[{first}] is {labels[first]}; classes are numbered from 0.')
    return labels.astype(np.int64)


def _class_names(classes: Sequence[str]) -> list[str]:
    names = [] if isinstance(classes, (str, Mapping)) else list(classes)
    if not names or not all(isinstance(n, str) for n in names):
        raise DistillError(f"classes must be a list of names, such as ('cat', 'dog'), not {classes!r}.")
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise DistillError(f'classes names {twice!r} more than once.')
    return names


def _subfolders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _folder(path: str | os.PathLike, what: str) -> str:
    return _existing(path, what, os.path.isdir, 'folder')


def _file(path: str | os.PathLike, what: str) -> str:
    return _existing(path, what, os.path.isfile, 'file')


def _existing(path: str | os.PathLike, what: str, exists: Any, kind: str) -> str:
    """The path with ``~`` resolved; an error names what lies beside it."""
    if not isinstance(path, (str, os.PathLike)):
        raise DistillError(f'{what} must be a path, got {path!r}.')
    full = os.path.expanduser(os.fspath(path))
    if exists(full):
        return full
    parent = os.path.dirname(os.path.abspath(full))
    beside = [n for n in os.listdir(parent) if exists(os.path.join(parent, n))] if os.path.isdir(parent) else None
    hint = f'{parent} does not exist either.' if beside is None else nearest(os.path.basename(full), beside)
    raise DistillError(f'{what}: there is no {kind} {full}: {hint}')
