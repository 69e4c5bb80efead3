"""Block sizes of the kernels: a default each, and what experiments.tune_kernels measured."""

TABLE = {
    "affine_update/pallas_gpu": {
        "default": {
            "columns": 32,
            "num_stages": 2,
            "num_warps": 8,
        },
    },
    "affine_update/pallas_tpu": {
        "default": {
            "group": 16,
            "row_work": 8,
            "start_bytes": 4194304,
            "state_work": 4,
            "units": 4,
        },
    },
    "affine_update/pallas_tpu_chunks": {
        "default": {
            "group": 4,
            "row_work": 128,
            "start_bytes": 4194304,
            "state_work": 48,
            "units": 2,
        },
    },
    "bank_read/pallas_gpu": {
        "default": {
            "num_stages": 2,
            "num_warps": 8,
            "rows": 64,
        },
    },
    "bank_read/pallas_tpu": {
        "default": {
            "bank_bytes": 12582912,
            "rows": 256,
        },
    },
    "chunk_update/pallas_tpu": {
        "default": {
            "group": 32,
            "row_work": 32,
            "start_bytes": 33554432,
            "state_work": 12,
            "units": 1,
        },
    },
    "deep_update/pallas_gpu": {
        "default": {
            "num_stages": 2,
            "num_warps": 8,
            "units": 16,
        },
    },
    "grouped_read/pallas_gpu": {
        "default": {
            "num_stages": 2,
            "num_warps": 8,
            "rows": 64,
        },
    },
    "grouped_read/pallas_tpu": {
        "default": {
            "rows": 256,
        },
    },
    "ssc_route/pallas_gpu": {
        "default": {
            "num_stages": 2,
            "num_warps": 4,
            "rows": 32,
        },
    },
    "ssc_route/pallas_tpu": {
        "default": {
            "rows": 256,
        },
    },
}
