"""The feed-forward pairs of every Flax family in transformers 4: paths, axes, keys, activations.

Facts checked against the classes themselves; a family that equals another is the same spec.
"""

from flaxslim._pair import Pair
from flaxslim._spec import Spec


def _bert_like(name: str, *more: Pair) -> Spec:
    encoder = Pair(
        at="encoder/layer/{i}",
        first="intermediate/dense",
        second="output/dense",
        width="intermediate_size",
        activation="config.hidden_act",
    )
    return Spec(name=name, pairs=(encoder, *more))


def _llama_like(name: str, activation: str) -> Spec:
    return Spec(
        name=name,
        pairs=Pair(
            at="layers/{i}/mlp",
            first=("gate_proj", "up_proj"),
            second="down_proj",
            gated=True,
            width="intermediate_size or 4*hidden_size",
            activation=activation,
        ),
    )


def _fc1_fc2(at: str, width: str) -> Pair:
    return Pair(
        at=at, first="fc1", second="fc2", width=width, activation="config.activation_function"
    )


BERT_FFN = _bert_like("BERT_FFN")
BIG_BIRD_FFN = _bert_like(
    "BIG_BIRD_FFN",
    # The question-answering head owns a second FFN of the same width.
    Pair(
        at="qa_classifier",
        first="intermediate/dense",
        second="output/dense",
        width="intermediate_size",
        activation="config.hidden_act",
    ),
)
ALBERT_FFN = Spec(
    name="ALBERT_FFN",
    # Shared layers: there is one site for each group, however many layers run it.
    pairs=Pair(
        at="albert_layer_groups/{g}/albert_layers/{j}",
        first="ffn",
        second="ffn_output",
        width="intermediate_size",
        activation="config.hidden_act",
    ),
)
DISTILBERT_FFN = Spec(
    name="DISTILBERT_FFN",
    pairs=Pair(
        at="transformer/layer/{i}/ffn",
        first="lin1",
        second="lin2",
        width="hidden_dim",
        activation="config.activation",
    ),
)

BART_FFN = Spec(
    name="BART_FFN",
    pairs=(
        _fc1_fc2("encoder/layers/{i}", "encoder_ffn_dim"),
        _fc1_fc2("decoder/layers/{i}", "decoder_ffn_dim"),
    ),
)
WHISPER_FFN = Spec(
    name="WHISPER_FFN",
    pairs=(
        *BART_FFN,
        # The head for audio classification takes the mean over time in between. Found by discovery.
        Pair(
            at="/",
            first="projector",
            second="classifier",
            width="classifier_proj_size",
            activation="identity",
            optional=True,
        ),
    ),
)
OPT_FFN = Spec(name="OPT_FFN", pairs=_fc1_fc2("decoder/layers/{i}", "ffn_dim"))
XGLM_FFN = Spec(name="XGLM_FFN", pairs=_fc1_fc2("layers/{i}", "ffn_dim"))
T5_FFN = Spec(
    name="T5_FFN",
    # One width for both stacks; v1.0 is plain, v1.1 and mT5 are gated.
    pairs=(
        Pair(
            at="{stack}/block/{i}/layer/{j}/DenseReluDense",
            first="wi",
            second="wo",
            width="d_ff",
            activation="config.dense_act_fn",
        ),
        Pair(
            at="{stack}/block/{i}/layer/{j}/DenseReluDense",
            first=("wi_0", "wi_1"),
            second="wo",
            gated=True,
            width="d_ff",
            activation="config.dense_act_fn",
        ),
    ),
)

GPT2_FFN = Spec(
    name="GPT2_FFN",
    pairs=Pair(
        at="h/{i}/mlp",
        first="c_fc",
        second="c_proj",
        # FlaxConv1D keeps its kernels transposed.
        first_axes="f d",
        second_axes="d f",
        width="n_inner or 4*n_embd",
        activation="config.activation_function",
    ),
)
GPT_NEO_FFN = Spec(
    name="GPT_NEO_FFN",
    pairs=Pair(
        at="h/{i}/mlp",
        first="c_fc",
        second="c_proj",
        width="intermediate_size or 4*hidden_size",
        activation="config.activation_function",
    ),
)
GPTJ_FFN = Spec(
    name="GPTJ_FFN",
    pairs=Pair(
        at="h/{i}/mlp",
        first="fc_in",
        second="fc_out",
        width="n_inner or 4*n_embd",
        activation="config.activation_function",
    ),
)
BLOOM_FFN = Spec(
    name="BLOOM_FFN",
    pairs=Pair(
        at="h/{i}/mlp",
        first="dense_h_to_4h",
        second="dense_4h_to_h",
        width="4*hidden_size",  # hard-coded in the class: no config can say another
        activation="gelu_new",
    ),
)
LLAMA_FFN = _llama_like("LLAMA_FFN", "config.hidden_act")
GEMMA_FFN = _llama_like("GEMMA_FFN", "config.hidden_activation or gelu_pytorch_tanh")

CLIP_TEXT_FFN, CLIP_VISION_FFN = (
    Spec(
        name=f"CLIP_{tower.upper()}_FFN",
        pairs=Pair(
            at=f"{tower}_model/encoder/layers/{{i}}/mlp",
            first="fc1",
            second="fc2",
            width="intermediate_size",
            activation="config.hidden_act",
        ),
    )
    for tower in ("text", "vision")
)
DINOV2_FFN = Spec(
    name="DINOV2_FFN",
    pairs=(
        Pair(
            at="encoder/layer/{i}/mlp",
            first="fc1",
            second="fc2",
            width="mlp_ratio*hidden_size",
            activation="config.hidden_act",
        ),
        Pair(
            at="encoder/layer/{i}/mlp",
            first="weights_in",
            second="weights_out",
            first_axes="d (2 f)",
            gated=True,
            width="swiglu(mlp_ratio*hidden_size)",
            activation="silu",
        ),
    ),
)
WAV2VEC2_FFN = Spec(
    name="WAV2VEC2_FFN",
    pairs=Pair(
        at="encoder/layers/{i}/feed_forward",
        first="intermediate_dense",
        second="output_dense",
        width="intermediate_size",
        activation="config.hidden_act",
    ),
)

# Families that are the same.
ELECTRA_FFN = ROBERTA_FFN = ROBERTA_PRELAYERNORM_FFN = ROFORMER_FFN = XLM_ROBERTA_FFN = BERT_FFN
BEIT_FFN = VIT_FFN = BERT_FFN
BLENDERBOT_FFN = BLENDERBOT_SMALL_FFN = MARIAN_FFN = MBART_FFN = PEGASUS_FFN = BART_FFN
LONGT5_FFN = MT5_FFN = T5_FFN
MISTRAL_FFN = LLAMA_FFN
