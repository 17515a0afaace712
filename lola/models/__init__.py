"""Language models in NumPy, with softmax attention or with LoLA.

>>> from lola.models import Llama                                    # doctest: +SKIP
>>> model = Llama.from_pretrained("needle", attention=lola.Config(sparse=256))  # doctest: +SKIP
"""

from .folder import BUNDLED
from .llama import Llama, ModelCache

__all__ = ["BUNDLED", "Llama", "ModelCache"]
