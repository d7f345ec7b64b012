"""`ds-higgs download`: all that training reads from the hub, before it is needed or for a machine without network."""

from collections.abc import Iterator
from pathlib import Path

from ds_higgs import hub
from ds_higgs.data.codec.higgs import SEMANTIC_FILES, SEMANTIC_FOLDER, semantic_repository
from ds_higgs.data.codec.opening import describe_codec
from ds_higgs.model.loading import BASE_FILES, check_weights_fit, load_tokenizer, resolve_base
from ds_higgs.model.native_format import is_native
from ds_higgs.model.tiny import CODEC_FOLDER


def download_all(base: str, *, revision: str | None, codec: str | None, out: Path | None) -> Iterator[str]:
    """Fetch the base checkpoint with its tokenizer, the codec and its semantic model; a line on each, once checked.

    Args:
        revision: of the base; None: the pinned one of the released base, else the newest.
        codec: hub id; None: the base's own, else the released one.
        out: the folder that becomes the base checkpoint, the codec in it; None: the hub's cache.

    Raises:
        UserError: something cannot be had, or what came is not what it should be.
    """
    folder = hub.download(base, what="base checkpoint", revision=revision, files=BASE_FILES, into=out)
    resolve_base(str(folder), None)
    load_tokenizer(folder)
    check_weights_fit(folder)
    form = "that of transformers >= 5.3, converted while loading" if is_native(folder) else "the original one"
    yield f"base checkpoint: {folder} (format: {form})"
    own = folder / CODEC_FOLDER
    if codec is not None or not _brings_codec(base, revision, folder, is_own_folder=out is not None):
        into = None if out is None else own
        own = hub.download(codec or hub.HIGGS_TOKENIZER, what="audio codec", into=into)
    if (semantic := semantic_repository(own)) is not None:
        into = None if out is None else own / SEMANTIC_FOLDER
        found = hub.download(semantic, what="the audio codec's semantic model", files=SEMANTIC_FILES, into=into)
        yield f"the audio codec's semantic model: {found}"
    describe_codec(own)
    yield f"audio codec: {own}"
    if out is not None:
        yield f"complete: use it as model.base: {out.absolute()}"


def _brings_codec(base: str, revision: str | None, folder: Path, *, is_own_folder: bool) -> bool:
    """Whether the base's repository has a codec; one in a folder of the user's may be of an earlier download."""
    if not is_own_folder:
        return (folder / CODEC_FOLDER).is_dir()
    listed = hub.list_files(base, what="base checkpoint", revision=revision)
    return any(file.startswith(f"{CODEC_FOLDER}/") for file in listed)
