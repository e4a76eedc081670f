"""The tables of a .tflite file, and the operators that a bundle may hold: arithmetic, no control flow and no state.

Left out beside those two: what makes a tensor as large as a number says (RANGE, FILL), random numbers, strings, tables
of hashes, and everything of other vendors.
"""

from __future__ import annotations

__all__ = [
    *(
        "BUFFER",
        "CODE",
        "MODEL",
        "NAMED",
        "OPERATOR",
        "OPERATORS",
        "OPTIONAL",
        "QUANTIZATION",
        "SIGNATURE",
        "SIZED",
    ),
    *("SUBGRAPH", "TENSOR"),
]

# tables of the schema of ai-edge-litert 2.3, their fields in the order of their slots
MODEL = "iooooxxoxx"  # version, operator_codes, subgraphs, description, buffers, two of metadata, signature_defs, ...
SUBGRAPH = "oooooi"  # tensors, inputs, outputs, operators, name, debug_metadata_index
TENSOR = "obioobxobxi"  # shape, type, buffer, name, quantization, is_variable, ..., external_buffer
QUANTIZATION = "oooobxi"  # min, max, scale, zero_point, details_type, details, quantized_dimension
OPERATOR = "iooboxbxxqqbxi"  # opcode_index, inputs, outputs, builtin_options_type, builtin_options, custom_options, ...
CODE = "bxii"  # deprecated_builtin_code, custom_code, version, builtin_code
BUFFER = "oqq"  # data, offset, size
SIGNATURE = "oooxi"  # inputs, outputs, signature_key, ..., subgraph_index
NAMED = "oi"  # name, tensor_index

_ROWS = (
    *((0, "ADD", 11, "bb"), (1, "AVERAGE_POOL_2D", 5, "biiiib"), (2, "CONCATENATION", 10, "ib")),
    *((3, "CONV_2D", 1, "biibiib"), (4, "DEPTHWISE_CONV_2D", 2, "biiibii"), (5, "DEPTH_TO_SPACE", 94, "i")),
    *((6, "DEQUANTIZE", 38, ""), (7, "EMBEDDING_LOOKUP", 0, ""), (8, "FLOOR", 0, "")),
    *((9, "FULLY_CONNECTED", 8, "bbbbbx"), (14, "LOGISTIC", 0, ""), (17, "MAX_POOL_2D", 5, "biiiib")),
    *(
        (18, "MUL", 21, "b"),
        (19, "RELU", 0, ""),
        (20, "RELU_N1_TO_1", 0, ""),
        (21, "RELU6", 0, ""),
        (22, "RESHAPE", 17, "v"),
    ),
    *((23, "RESIZE_BILINEAR", 15, "bb"), (25, "SOFTMAX", 9, "i"), (26, "SPACE_TO_DEPTH", 19, "i")),
    *((28, "TANH", 0, ""), (34, "PAD", 22, ""), (36, "GATHER", 23, "ii"), (39, "TRANSPOSE", 26, "")),
    *((40, "MEAN", 27, "b"), (41, "SUB", 28, "bb"), (42, "DIV", 29, "b"), (43, "SQUEEZE", 30, "v")),
    *((45, "STRIDED_SLICE", 32, "iiiiib"), (47, "EXP", 33, ""), (49, "SPLIT", 35, "i")),
    *((53, "CAST", 37, "bb"), (54, "PRELU", 0, ""), (55, "MAXIMUM", 39, ""), (56, "ARG_MAX", 40, "b")),
    *((57, "MINIMUM", 39, ""), (58, "LESS", 41, ""), (59, "NEG", 42, ""), (60, "PADV2", 43, "")),
    *((61, "GREATER", 44, ""), (62, "GREATER_EQUAL", 45, ""), (63, "LESS_EQUAL", 46, "")),
    *((64, "SELECT", 47, ""), (65, "SLICE", 48, ""), (66, "SIN", 0, ""), (67, "TRANSPOSE_CONV", 49, "biibb")),
    *((69, "TILE", 51, ""), (70, "EXPAND_DIMS", 52, ""), (71, "EQUAL", 53, ""), (72, "NOT_EQUAL", 54, "")),
    *((73, "LOG", 0, ""), (74, "SUM", 27, "b"), (75, "SQRT", 0, ""), (76, "RSQRT", 0, "")),
    *((78, "POW", 56, ""), (79, "ARG_MIN", 57, "b"), (81, "REDUCE_PROD", 27, "b")),
    *((82, "REDUCE_MAX", 27, "b"), (83, "PACK", 59, "ii"), (84, "LOGICAL_OR", 60, "")),
    *((85, "ONE_HOT", 61, "i"), (86, "LOGICAL_AND", 62, ""), (87, "LOGICAL_NOT", 63, "")),
    *((88, "UNPACK", 64, "ii"), (89, "REDUCE_MIN", 27, "b"), (90, "FLOOR_DIV", 65, "")),
    *((91, "REDUCE_ANY", 27, "b"), (92, "SQUARE", 66, ""), (95, "FLOOR_MOD", 72, "")),
    *((97, "RESIZE_NEAREST_NEIGHBOR", 74, "bb"), (98, "LEAKY_RELU", 75, "i")),
    *((99, "SQUARED_DIFFERENCE", 76, ""), (100, "MIRROR_PAD", 77, "b"), (101, "ABS", 78, "")),
    *((102, "SPLIT_V", 79, "i"), (104, "CEIL", 0, ""), (105, "REVERSE_V2", 81, ""), (106, "ADD_N", 82, "")),
    *((107, "GATHER_ND", 83, ""), (108, "COS", 84, ""), (111, "ELU", 0, ""), (114, "QUANTIZE", 89, "")),
    *((116, "ROUND", 0, ""), (117, "HARD_SWISH", 91, ""), (122, "SCATTER_ND", 97, "")),
    *((123, "SELECT_V2", 98, ""), (126, "BATCH_MATMUL", 101, "bbb"), (128, "CUMSUM", 102, "bb")),
    *(
        (130, "BROADCAST_TO", 104, ""),
        (132, "CONV_3D", 106, "biiibiii"),
        (150, "GELU", 116, "b"),
        (152, "RELU_0_TO_1", 0, ""),
    ),
    *((156, "ATAN2", 122, ""), (158, "SIGN", 123, "")),
)
"""(code, name, number of its options in the union BuiltinOptions or 0, their fields in order), from the schema of
ai-edge-litert 2.3. Fields: b, i and q have 1, 4 and 8 bytes, v is a vector of 4-byte numbers, x must be absent."""

OPERATORS = {code: (name, options, fields) for code, name, options, fields in _ROWS}
OPTIONAL = {"CONV_2D": 2, "DEPTHWISE_CONV_2D": 2, "FULLY_CONNECTED": 2, "CONV_3D": 2, "TRANSPOSE_CONV": 3}
"""Which input may be left out, as -1: the bias. Elsewhere kernels follow a null pointer."""
SIZED = {
    *("PAD", "PADV2", "MIRROR_PAD", "TILE", "BROADCAST_TO", "ONE_HOT", "SCATTER_ND"),
    *("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "TRANSPOSE_CONV"),
}
"""Those whose output is as large as the numbers in one of their constants say."""
