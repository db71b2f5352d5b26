"""Hugging Face folders and Hub repositories: read as stored, load as Flax, write whole.

Nothing of a checkpoint is ever executed: msgpack and safetensors are read as data, and a
`pytorch_model.bin` only through `torch.load(weights_only=True)`.
"""

from flaxslim.checkpoint._names import to_flax as to_flax
from flaxslim.checkpoint._names import unused as unused
from flaxslim.checkpoint._orbax import convert_orbax as convert_orbax
from flaxslim.checkpoint._orbax import orbax_abstract as orbax_abstract
from flaxslim.checkpoint._orbax_read import is_orbax as is_orbax
from flaxslim.checkpoint._pretrained import from_pretrained as from_pretrained
from flaxslim.checkpoint._read import Checkpoint as Checkpoint
from flaxslim.checkpoint._read import load as load
from flaxslim.checkpoint._read import read as read
from flaxslim.checkpoint._remote import fetched as fetched
from flaxslim.checkpoint._remote import sent as sent
from flaxslim.checkpoint._write import save as save
