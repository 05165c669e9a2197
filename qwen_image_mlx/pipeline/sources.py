"""Finds the files of a model's components: the checkpoint's own, replacements, and defaults for missing configs.

Some tools save weights alone. The released models' configs then replace the missing ones, and the class is found from a
record next to the weights, or from the weights; `weights_map/packs.json` has both tables.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, RequestError
from ..names import StrPath
from ..registry import FOLDERS, MAIN, PROCESSOR, TRANSFORMER, VISION, Component, all_components, component_of
from ..weights.mapping import canonical_names, needs_tensor, weights_map
from ..weights.recognize import holds, part_of
from ..weights.snapshot import HubSnapshot, WeightFiles, sibling_vision_file, weight_file

logger: logging.Logger = logging.getLogger(__name__)

INDEX = "model_index.json"
CONFIG = "config.json"


class Sources:
    """The files of a model's components.

    Args:
        snapshot: the checkpoint.
        replaced: files or folders that replace the checkpoint's own components, keyed by the component's folder.

    Raises:
        RequestError: one of them does not exist.
    """

    def __init__(self, snapshot: HubSnapshot, replaced: Mapping[str, StrPath] | None = None):
        self.snapshot = snapshot
        self.replaced: dict[str, Path] = {name: Path(path).expanduser() for name, path in (replaced or {}).items()}
        for name, path in self.replaced.items():
            if not path.exists():
                raise RequestError(f"the {name} {str(path)!r} does not exist: give a weights file or its folder")
        # A folder of one component counts as a checkpoint whose root is that component's folder.
        self._folders = {name: HubSnapshot(path) for name, path in self.replaced.items() if path.is_dir()}
        self._read: dict[str, WeightFiles] = {}

    def add(self, name: str, place: Path) -> None:
        """Adds a component from elsewhere: its file, or its folder."""
        self.replaced[name] = place
        self._read.pop(name, None)
        self._folders.pop(name, None)
        if place.is_dir():
            self._folders[name] = HubSnapshot(place)

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json, or an equivalent derived from the weights."""
        return {"_class_name": self._pack["class"]} if self._pack else self.snapshot.read_json(INDEX)

    def config(self, folder: str, name: str = CONFIG) -> dict[str, Any]:
        """A component's JSON; a file without one takes the checkpoint's, a checkpoint without any the released models'.

        Raises:
            CheckpointError: the checkpoint should have it, but does not.
        """
        path = f"{folder}/{name}"
        if folder in self._folders and self._folders[folder].exists(name):
            return self._folders[folder].read_json(name)
        if self._pack and path in weights_map("packs")["usual"] and not self.snapshot.exists(path):
            usual: dict[str, Any] = weights_map("packs")["usual"][path]
            given: dict[str, Any] = self._pack.get("configs", {}).get(path, {})
            return usual | given
        return self.snapshot.read_json(path)

    def image_processor(self) -> dict[str, Any]:
        """How images are prepared: preprocessor_config.json, or what transformers 5 nests in processor_config.json.

        Raises:
            CheckpointError: the checkpoint has neither.
        """
        nested = f"{PROCESSOR}/processor_config.json"
        if not self.snapshot.exists(f"{PROCESSOR}/preprocessor_config.json") and self.snapshot.exists(nested):
            declared = self.snapshot.read_json(nested).get("image_processor")
            if isinstance(declared, dict):
                return declared
        return self.config(PROCESSOR, "preprocessor_config.json")

    def stand_ins(self) -> dict[str, dict[str, Any]]:
        """Replacements for the checkpoint's missing JSON files, keyed by path; {} if it has its own."""
        if not self._pack:
            return {}
        missing = [path for path in weights_map("packs")["usual"] if not self.snapshot.exists(path)]
        configs = {path: self.config(*path.split("/")) for path in missing}
        return {INDEX: self.index} | configs

    def weights(self, component: Component, keep: Callable[[str], bool] | None = None) -> WeightFiles:
        """A component's files; with an index, only those with a tensor to `keep`."""
        files = self._given(component.home, weights_map(component.map)["stem"], keep)
        if component.folder and not holds(component, {*files.tensors, *(files.index or ())}):
            files = self._missing_vision(component, files) or files
        return files

    def _given(self, folder: str, stem: str, keep: Callable[[str], bool] | None = None) -> WeightFiles:
        """A component's files: its replacement's, else the checkpoint's; from a shared file, its own tensors only.

        The tensors' names are those of a file with this component alone.
        """
        if folder in self._folders:
            files = self._folders[folder].weight_files("", stem, keep)
        elif folder in self.replaced:
            if folder not in self._read:
                self._read[folder] = weight_file(self.replaced[folder])
            files = self._read[folder]
        else:
            files = self.snapshot.weight_files(folder, stem, keep)
        return replace(files, tensors=part_of(folder, files.tensors))

    def _missing_vision(self, component: Component, files: WeightFiles) -> WeightFiles | None:
        """The vision tower that a text encoder's file lacks: llama.cpp's mmproj next to it, else the checkpoint's."""
        if component.role == VISION and (found := sibling_vision_file(files.files)):
            logger.info("the vision tower is read from %s", found)
            return weight_file(found)
        if component.folder not in self.replaced:
            return None
        logger.info("%s has no %s: the one of %s is used", files.files[0], component.role, self.snapshot.model)
        return self.snapshot.weight_files(
            component.folder, weights_map(component.map)["stem"], lambda name: needs_tensor(component, name, (MAIN,))
        )

    def names(self, component: Component) -> set[str]:
        """The tensor names of a component's files; read from its index if there is one."""
        files = self.weights(component, keep=lambda name: False)
        return {*files.tensors, *(files.index or ())}

    @cached_property
    def _pack(self) -> dict[str, Any] | None:
        """The replacements for a checkpoint's JSON files; None if it has its own."""
        usual = {f"{row.role}/{weights_map(row.map)['stem']}" for row in all_components(TRANSFORMER)}
        # then it is damaged
        released = any(name.startswith(tuple(usual)) for name in self.snapshot.names(TRANSFORMER))
        if self.snapshot.exists(INDEX) or released or not all(self.snapshot.names(part) for part in FOLDERS):
            return None
        pack = self._recorded() or self._guessed()
        if pack is None:
            raise CheckpointError(
                f"{self.snapshot.model} has no {INDEX}, and its weights are not those of a Qwen-Image model: name "
                "the folder of one"
            )
        logger.info("%s has no %s: it is taken for a %s", self.snapshot.model, INDEX, pack["class"])
        if "advice" in pack:
            logger.warning("the kind of model of %s can only be guessed; %s", self.snapshot.model, pack["advice"])
        return pack

    def _recorded(self) -> dict[str, Any] | None:
        table = weights_map("packs")
        record = table["record"]
        if not self.snapshot.exists(record["file"]):
            return None
        declared = self.snapshot.read_json(record["file"])
        for field in record["fields"]:
            value: Any = declared
            for key in field:
                value = value.get(key) if isinstance(value, dict) else None
            if isinstance(value, str) and value in table["recorded"]:
                recorded: dict[str, Any] = table["recorded"][value]
                return recorded
        return None

    def _guessed(self) -> dict[str, Any] | None:
        guess: dict[str, Any]
        for guess in weights_map("packs")["guessed"]:
            component = component_of(guess["component"])
            if guess["holds"] in canonical_names(component, self.names(component)).values():
                return guess
        return None
