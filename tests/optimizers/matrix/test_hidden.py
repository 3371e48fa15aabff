"""Names and shapes of real models: what muon takes for a hidden matrix, and what it refuses to take by a wildcard."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import pytest

import gradxform as gx
from gradxform.optimizers.matrix.hidden import names_of_ends

pytestmark = pytest.mark.once

ENDS = {
    "nanoGPT, HF GPT-2": "transformer/wte/embedding transformer/wpe/embedding lm_head/kernel wte wpe",
    "minGPT": "tok_emb pos_emb head/weight transformer.wte.weight lm_head.weight",
    "GPT-NeoX": "gpt_neox/embed_in/embedding embed_out/kernel",
    "modded-nanoGPT": "embed/weight value_embeds/0/weight lm_head/weight",
    "Llama": "tok_embeddings/weight output/weight model/embed_tokens/embedding params/output/kernel",
    "BERT": "bert/embeddings/word_embeddings/embedding bert/embeddings/position_embeddings/embedding classifier/kernel "
    "bert/embeddings/token_type_embeddings/embedding cls/predictions/decoder/kernel qa_outputs/kernel",
    "RoBERTa": "lm_head/dense/kernel lm_head/decoder/kernel classifier/out_proj/kernel",
    "T5": "shared/embedding encoder/block/0/layer/0/SelfAttention/relative_attention_bias/embedding",
    "T5X, MaxText": "token_embedder/embedding decoder/logits_dense/kernel decoder/position_embedder/embedding "
    "encoder/relpos_bias/rel_embedding params/params/decoder/logits_dense/kernel",
    "Flax lm1b": "decoder/logitdense/kernel decoder/Embed_0/embedding decoder/posembed_output/pos_embedding",
    "nanodo": "embed/embedding pos_embed/embedding",
    "Gemma": "embedder/input_embedding embedder/input_embedding_table",
    "levanter": "embeddings/token_embeddings embeddings/token_out_embeddings lm_head/weight",
    "Equinox BERT": "encoder/embedder_block/token_embedder/weight encoder/embedder_block/segment_embedder/weight "
    "classifier_head/weight",
    "Equinox ViT": "patch_embedding/linear/weight positional_embedding cls_token",
    "HF ViT": "vit/embeddings/patch_embeddings/projection/kernel vit/embeddings/position_embeddings "
    "vit/embeddings/cls_token",
    "timm, big_vision": "patch_embed/proj/kernel pos_embedding embedding/kernel head/kernel head_0 MAPHead_0/probe",
    "Haiku": "language_model/~/embed/embeddings language_model/positional_embeddings",
    "fairseq, Keras": "decoder/output_projection/weight token_embedding/embeddings decoder/output/kernel",
    "x-transformers": "token_emb/emb/weight to_logits/weight",
    "DiT, wav2vec 2": "final_layer/linear/kernel final_proj/kernel x_embedder/proj/kernel",
    "own": "output_layer/kernel out/kernel params/out/kernel vocabulary unembedding unembed LMHead_0/kernel vocab_proj "
    "logits readout/w proj_out/kernel codebook positional_encoding tok pos position token outputs/w last_layer/kernel "
    "word_embeddings/weight prediction_head/kernel value_head/kernel Classifier_0/kernel",
}
HIDDEN = {
    "nanoGPT, HF GPT-2": "transformer/h/0/attn/c_attn/kernel transformer/h/11/attn/c_proj/kernel h/0/mlp/c_fc/kernel",
    "GPT-J": "transformer/h/0/attn/out_proj/kernel transformer/h/0/mlp/fc_in/kernel transformer/h/0/mlp/fc_out/kernel",
    "Llama": "model/layers/0/self_attn/q_proj/kernel model/layers/0/self_attn/o_proj/kernel layers/0/feed_forward/w2 "
    "model/layers/0/mlp/down_proj/kernel layers/0/attention/wo/weight",
    "BERT": "bert/encoder/layer/0/attention/self/query/kernel bert/encoder/layer/0/attention/output/dense/kernel "
    "bert/encoder/layer/0/intermediate/dense/kernel bert/encoder/layer/0/output/dense/kernel bert/pooler/dense/kernel "
    "pre_classifier/kernel",
    "BERT, scanned": "encoder/layers/output/dense/kernel encoder/layers/attention/output/dense/kernel",
    "T5": "encoder/block/0/layer/0/SelfAttention/o/kernel encoder/block/0/layer/1/DenseReluDense/wo/kernel",
    "T5X, MaxText": "decoder/layers_0/self_attention/out/kernel decoder/layers/self_attention/out/kernel "
    "decoder/layers_0/encoder_decoder_attention/out/kernel encoder/layers_0/mlp/wi_0/kernel "
    "decoder/layers/mlp/wo/kernel decoder/layers/MoeBlock_0/gate/kernel",
    "Flax lm1b": "decoder/encoderdecoderblock_0/SelfAttention_0/out/kernel "
    "decoder/encoderdecoderblock_0/MlpBlock_0/Dense_0/kernel",
    "nanodo": "blocks_0/CausalAttn_0/attn_out_proj/kernel blocks_0/Mlp_0/Dense_0/kernel",
    "Gemma": "layers/attn/attn_vec_einsum/w layers/attn/qkv_einsum/w layers/mlp/gating_einsum layers/mlp/linear",
    "levanter": "transformer/layers/stacked/self_attn/o_proj/weight transformer/blocks/attn/c_proj/weight",
    "Equinox BERT": "encoder/layers/0/attention_block/attention/output_proj/weight "
    "encoder/layers/0/ff_block/output/weight encoder/layers/0/ff_block/mlp/weight encoder/pooler/weight",
    "HF ViT": "vit/encoder/layer/0/attention/attention/query/kernel vit/encoder/layer/0/output/dense/kernel",
    "big_vision": "Transformer/encoderblock_0/MultiHeadDotProductAttention_0/out/kernel token_mixing/Dense_0/kernel "
    "pre_logits/kernel Transformer/encoderblock_0/MlpBlock_0/Dense_1/kernel stem/kernel",
    "Haiku": "transformer/~/h0_attn/query/w language_model/transformer/multi_head_attention/linear/w "
    "language_model/transformer/linear_1/w",
    "KerasHub": "transformer_layer_0/feedforward_output_dense/kernel "
    "transformer_layer_0/self_attention_layer/attention_output/kernel",
    "wav2vec 2": "encoder/layers/0/feed_forward/output_dense/kernel encoder/layers/0/attention/out_proj/kernel",
    "recurrent": "lstm_cell/output_gate/kernel OptimizedLSTMCell_0/ho/kernel",
    "own": "mixer/out/kernel multi_head_attention/kernel MultiHead_0/kernel heads/kernel token_mixer/kernel "
    "ahead/kernel ensemble/kernel member/kernel assembler/kernel positioner/kernel combine/kernel "
    "layers/out/kernel hidden/kernel attention_output/kernel ffn_output/kernel linear_pos/kernel",
}


def rows(table: dict[str, str]):
    return pytest.mark.parametrize(
        "path", [pytest.param(path, id=f"{m}: {path}") for m in table for path in table[m].split()]
    )


def nested(path: str, leaf) -> dict:
    for part in reversed(path.split("/")):
        leaf = {part: leaf}
    return leaf


MATRIX = jnp.ones((4, 4))


@rows(ENDS)
def test_embeddings_and_heads_are_refused_unless_their_whole_path_is_given(path):
    params = {"hidden": {"first": MATRIX}, **nested(path, MATRIX)}
    for pattern in (".*", gx.glob("**")):
        with pytest.raises(
            ValueError, match=r"muon: .* takes .*, by its name \(\w+\) an embedding or a head, .* whole path"
        ):
            gx.muon(0.02, pattern).init(params)
    state = gx.muon(0.02, {"hidden/.*": "in out", path: "out in"}).init(params)
    assert jax.tree.leaves(state.mu)[0].shape == (4, 4)


@rows(HIDDEN)
def test_hidden_matrices_are_taken(path):
    [moment] = jax.tree.leaves(gx.muon(0.02, ".*").init(nested(path, MATRIX)).mu)
    assert moment.shape == (4, 4)


def test_out_beside_a_query_is_attentions():
    attention = dict.fromkeys(("query", "key", "value", "out"), MATRIX)
    assert gx.muon(0.02, ".*").init({**attention, "mixer": {"q_proj": MATRIX, "output_proj": MATRIX}}).mu.keys()
    assert names_of_ends(("out/kernel", "in/kernel")) == ("out", None)
    assert names_of_ends(("out/kernel", "query/kernel")) == (None, None)


# Shapes


@pytest.mark.parametrize(
    ("path", "layout", "shape", "taken"),
    [
        ("shared/weight", "in out", (32128, 512), False),
        ("language_model/~/linear/w", "in out", (512, 32000), False),
        ("language_model/~/linear/w", "in out", (256, 4096), False),
        ("language_model/~/linear/w", "in out", (256, 4095), True),
        ("language_model/~/linear/w", "in out", (257, 4096), True),
        ("unnamed", "in out out", (64, 512, 8), False),
        ("unnamed", "each in out", (32, 64, 512), True),  # each of the matrices is judged
        ("unnamed", "in 64*out", (64, 4096), True),
        ("unnamed", "in (62+1+1)*out", (64, 4096), True),
        ("unnamed", "in (64+1)*out", (64, 65 * 64), False),
        ("first", "in out", (784, 10), True),
        ("layers/0/self_attn/k_proj/kernel", "in out", (4096, 128), True),  # the keys of a single head
        ("decoder/layers/moe_block/gate/kernel", "in out", (4096, 64), True),  # a router
        ("blocks/3/lora_a", "in out", (8192, 8), True),  # an adapter
    ],
)
def test_a_thin_matrix_outside_blocks_is_taken_for_one_over_a_vocabulary(path, layout, shape, taken):
    params = nested(path, jax.ShapeDtypeStruct(shape, jnp.float32))

    def init(matrices):
        return jax.eval_shape(gx.muon(0.02, matrices).init, params)

    if not taken:
        with pytest.raises(ValueError, match=rf"takes '{path}', by its shape \(\d+×\d+\) an embedding or a head"):
            init({".*": layout})
    init({".*" if taken else path: layout})


# What a wildcard takes is told


def told(caplog, tx, params):
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="gradxform"):
        tx.init(params)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("name", ["muon", "normuon"])
def test_what_a_wildcard_takes_is_told_once_and_in_a_few_words(caplog, name):
    block = {"attn": {"qkv": MATRIX, "out": MATRIX}, "mlp": {"up": MATRIX}, "norm": jnp.ones(4)}
    params = {"embed": MATRIX, "h": [block] * 12, "first": MATRIX}
    tx = getattr(gx, name)(0.02, {".*/(qkv|out|up)": "in out", "first": "out in"}, gx.sgd(0.1))
    assert told(caplog, tx, params) == [
        f"{name}: '.*/(qkv|out|up)' takes 36 of 50 leaves: h/{{0…11}}/attn/out, h/{{0…11}}/attn/qkv, h/{{0…11}}/mlp/up"
    ]
    assert told(caplog, tx, params) == []
    assert len(told(caplog, tx, {**params, "h": [block] * 2})) == 1  # another model
    many = {f"{'abcdefgh'[i % 8]}_{'x' * i}/kernel": MATRIX for i in range(200)}
    [message] = told(caplog, getattr(gx, name)(0.02, ".*/kernel"), many)
    assert len(message) < 300


def test_no_wildcard_is_told_of_nothing(caplog):
    assert told(caplog, gx.muon(0.02, {"first": "in out"}, gx.sgd(0.1)), {"first": MATRIX, "second": MATRIX}) == []
