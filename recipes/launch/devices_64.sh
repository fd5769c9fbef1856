#!/bin/sh
# Eight Atlas 800T A2 of eight NPUs each: start it on every machine, with the same folder mounted, as
#
#     MASTER_ADDR=<address of the first machine> NODE_RANK=<0 to 7> sh recipes/launch/devices_64.sh recipe=...
#
# (Not run on a device by the authors.)
#
# The first machine, NODE_RANK=0, also runs the scheduler. Rank 8 * NODE_RANK + i is NPU i of a machine. Neither a rank
# table nor hostnames are needed: the ranks find each other through the scheduler, at MASTER_PORT and the port after it.
# A rank table (RANK_TABLE_FILE, from hccl_tools.py or the cluster's scheduler) lists servers, their NPUs' addresses
# and the rank of each; HCCL then takes the addresses from there. Give it where NPUs can't discover each other:
# RANK_TABLE=<file>.
: "${MASTER_ADDR:?is the address of the first machine}" "${NODE_RANK:?is the number of this machine, from 0}"
exec msrun --worker_num=$((8 * ${NUM_NODES:-8})) --local_worker_num=8 --node_rank="$NODE_RANK" \
    --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-8118}" --join=True --tail_worker_log=0 \
    --log_dir="log/node_$NODE_RANK" --bind_core=True ${RANK_TABLE:+--rank_table_file="$RANK_TABLE"} \
    python -m mindpangu.train run=ascend_8 "$@"
