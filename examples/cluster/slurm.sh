#!/usr/bin/env bash
# Tokenizes a corpus on Slurm: sbatch --nodes=8 slurm.sh CORPUS TOKENIZER OUT
# The nodes of one allocation become one Ray cluster; when the job is killed or requeued, the same command goes on where it stopped.
# CORPUS lies where every node sees it, at the same place: on a shared file system, or in a bucket; so may OUT. TOKENIZER is a folder of the first node.
#SBATCH --job-name=vqmill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

corpus=$1 tokenizer=$2 out=$3

# source /path/to/.venv/bin/activate    # the same on every node

# Nobody enters the cluster without this token. It lives in the environment of this job only; traffic is not encrypted.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_TOKEN

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(getent ahostsv4 "$head" | awk 'NR == 1 { print $1 }'):6379

srun ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    vqmill tokenize "$corpus" --tokenizer "$tokenizer" --out "$out" --address auto --device cuda \
    || [ $? -eq 3 ] # 3: done, with some samples quarantined
