"""Every family against transformers: outputs, choices, gradients, and the way back."""

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, build

from moe import hub
from moe.hub.families import FAMILIES
from moe.hub.parity import compare, difference, draw
from moe.model import IGNORE

ROWS = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def check(row) -> None:
    assert row.imports, "the chosen experts differ"
    assert row.exports, "other bytes, other names, or other logits in transformers"
    assert max(row.logits, row.cached, row.fp8) < 1e-5
    assert row.good


@ROWS
@pytest.mark.parametrize("seed", range(3))
def test_a_family_computes_as_in_transformers_and_comes_back_the_same(family, seed):
    check(compare(family, models=1, seed=100 + seed))


@pytest.mark.slow
@ROWS
def test_thirty_more_of_each_family(family):
    check(compare(family, models=30, seed=1000))


@pytest.mark.parametrize("name", ["DeepseekV3", "Mixtral", "Qwen3Moe"])
def test_stacked_experts_as_transformers_5_holds_them_are_read_as_well(name, tmp_path):
    theirs = draw(next(family for family in FAMILIES if family.name == name), seed=1)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    tokens = torch.randint(96, (1, 16))
    assert difference(hub.load(tmp_path, device="cpu")(tokens), theirs(tokens).logits) < 1e-5


@torch.no_grad()
def test_multi_token_prediction_is_that_of_transformers(tmp_path):
    from transformers import DeepseekV3ForCausalLM
    from transformers.modeling_layers import MtpModel

    ours = build(num_nextn_predict_layers=2, q_lora_rank=10)
    hub.save(ours, None, tmp_path, mtp=True)
    main = DeepseekV3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    layers = SMALL.num_hidden_layers
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{layers}\.", rf"model\.layers\.{layers + 1}\."]
    theirs = MtpModel.from_pretrained(main).eval()
    tokens = torch.randint(64, (2, 20))
    state, positions = main.model(tokens).last_hidden_state, torch.arange(20)[None]
    losses = ours.losses(tokens, tokens.roll(-1, 1).index_fill(1, torch.tensor([19]), IGNORE))
    for depth in (1, 2):
        # Theirs takes the tokens that come after, one more at each depth, and fills up; here windows become shorter
        following = F.pad(tokens[:, depth:], (0, depth))
        state = theirs.forward_layer(depth - 1, state, positions, None, input_ids=following)
        logits = theirs._project_to_logits(state)[:, : 20 - depth - 1]
        wanted = F.cross_entropy(logits.flatten(0, 1), tokens[:, depth + 1 :].flatten())
        torch.testing.assert_close(losses.mtp[depth - 1], wanted, rtol=1e-5, atol=0)
