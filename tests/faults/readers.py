"""Everything that reads a file, by its name."""

from functools import partial

from faults import checkpoints as c
from faults import data as d
from faults import tiny
from faults.reader import Reader, by_bytes, by_json, header_or_bytes, text_file

HEAVY = ("bin", "orbax", "zarr")  # which import for seconds: not for the ordinary run

_SHARDS = partial(tiny.torch_folder, shard_size=700)
_ZARR = c.orbax_folder(use_ocdbt=False)

# fmt: off
READERS: dict[str, Reader] = {
    name: Reader(make=make, spoil=spoil, open=read)
    for name, (make, spoil, read) in {
        "safetensors": (tiny.torch_folder, header_or_bytes, c.read_checkpoint),
        "index": (_SHARDS, by_json("*.index.json"), c.read_checkpoint),
        "msgpack": (tiny.flax_folder, c.spoilt_msgpack, c.read_checkpoint),
        "bin": (c.pickled_folder, by_bytes("*.bin"), c.read_checkpoint),
        "config": (tiny.torch_folder, by_json("config.json"), c.read_checkpoint),
        "layout": (c.per_layer_folder, c.spoilt_layout, c.read_layout),
        "record": (c.per_layer_folder, by_json("flaxslim.json"), c.read_record),
        "plan": (c.planned_folder, by_json("*.json"), c.read_plan),
        "journal": (c.journal_folder, by_json(".written.json"), c.read_journal),
        "orbax": (c.orbax_folder(), c.spoilt_orbax, c.read_orbax_tree),
        "zarr": (_ZARR, c.spoilt_orbax, c.read_orbax_tree),
        "yaml": (text_file("config.yml", d.YAML), d.spoilt_yaml, d.read_yaml),
        "recipe": (d.recipes_folder, d.spoilt_recipe, d.read_recipes),
        "texts": (d.texts_folder, d.spoilt_texts, d.read_text_files),
        "arrays": (d.arrays_folder, d.spoilt_arrays, d.read_arrays),
        "images": (d.images_folder, d.spoilt_images, d.read_images),
        "tokenizer": (d.tokenizer_folder, by_json("*.json"), d.read_tokenized),
        "statistics": (d.kept_folder, header_or_bytes, d.read_kept),
        "times": (d.times_folder, by_json("times.json"), d.read_times),
        "export": (d.exported_file, header_or_bytes, d.read_exported),
    }.items()
}
