#!/usr/bin/env bash
# Train on several machines without a scheduler. The same command on each of them, in any order:
#
#     cluster/torchrun.sh HEAD[:PORT] MACHINES GPUS_PER_MACHINE -- arguments of train_cva.py (or of $SCRIPT)
#     cluster/torchrun.sh node1 2 8 -- --config ds_configs/zero2.json --recipe recipes/primus_m.yaml \
#         --data FOLDER --output runs/primus_m train.batch_size=16
#
# HEAD is one of the machines, by a name or address that all of them reach (port 29500 unless given); OUTPUT is on a
# file system that all of them see. Where the others cannot reach a machine by its own host name, set PET_LOCAL_ADDR
# there to an address that they can; where that name means 127.0.1.1 to the machine itself, as on Debian, set
# GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME on all to the network that joins them (eth0). A machine that was lost: the
# same command there again, and all go on from the newest checkpoint. A head that was lost: the others stop, and the
# same command is given on all of them. To stop, with a checkpoint: `kill` the torchrun of every machine.
set -euo pipefail

if (($# < 5)) || [[ $4 != -- ]]; then
    echo "usage: cluster/torchrun.sh HEAD[:PORT] MACHINES GPUS_PER_MACHINE -- arguments of train_cva.py" >&2
    exit 2
fi
head=$1 machines=$2 gpus=$3
shift 4
[[ $head == *:* ]] || head+=:29500

# What the machines meet under: the same for the same command, so that a machine which comes back finds the others, and
# one that was given other arguments does not.
id=$(printf '%s\n' "$machines" "$gpus" "$@" | cksum)

options=(
    --nnodes "$machines"
    --nproc-per-node "$gpus"
    --rdzv-backend c10d
    --rdzv-endpoint "$head"
    --rdzv-id "cva-${id%% *}"
    # seconds: to reach a head that starts later or boots; for all machines to be there, the lost one again included
    --rdzv-conf "read_timeout=600,join_timeout=3600"
    # Every loss of a machine costs each other machine one, a mistake in the arguments costs all of them: enough to get
    # over a bad night, few enough that a run which cannot work ends within minutes.
    --max-restarts "${MAX_RESTARTS:-3}"
    --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" # handed on to the ranks; SIGUSR1 is not by default
    --shutdown-timeout 300                                    # seconds the ranks get to save then; 30 by default
)
# With torch 2.15 a lost machine cannot come back otherwise: the others keep the address of the ranks' store from the round
# before and wait for each other until they give up.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# exec: a signal to this process is one to torchrun. Every start and restart goes on from the newest checkpoint.
exec torchrun "${options[@]}" "$(dirname "${BASH_SOURCE[0]}")/../${SCRIPT:-train_cva.py}" "$@" --resume auto
