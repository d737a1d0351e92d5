r"""AiM-B (160M parameters) from captions at 256x256, on images in WebDataset.

The paper leaves text to image as future work, so there is no published result; not trained here.
The length is that of 16 passes over 12 million pairs in batches of 1024.

aim-jax train_text_tokenizer --data captioned --vocab_size 16384 --out runs/text_tokenizer.json
aim-jax extract_codes --tokenizer runs/vq_f16 --data_name captions --data captioned \
  --out codes/captioned
aim-jax train --config aim_t2i_b --workdir runs/aim_t2i_b --config.accumulate=4

Set --config.model.caption_vocab to the number of tokens that the first program prints, if the
captions gave fewer. For other machines, aim-jax compile --search finds accumulate.
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import text_recipe


def get_config() -> ConfigDict:
    """Return the configuration."""
    return text_recipe("B", steps=187_500)
