#!/usr/bin/env bash
# Measures the CPU time that Foresee and nginx take for one request, in alternating rounds, and prints
# one table. Needs Linux, rustc, nginx and wrk, and the free ports 9100 to 9103.
#
# Environment: FORESEE is the program to measure, ROUNDS the number of rounds, SECONDS_EACH the
# duration of one measurement, KINDS the rows of the table.
set -euo pipefail
cd "$(dirname "$0")"

foresee=$(realpath "${FORESEE:-../../target/release/foresee}")
rounds=${ROUNDS:-5}
seconds=${SECONDS_EACH:-5}
kinds=${KINDS:-stream slow whole}

scratch=$(mktemp -d)
pids=()
stop() {
    kill "${pids[@]}" 2>/dev/null || true
    wait "${pids[@]}" 2>/dev/null || true
    rm -rf "$scratch"
}
trap stop EXIT

rustc -O --edition 2024 upstream.rs -o "$scratch/upstream"
"$scratch/upstream" 9100 &
pids+=($!)
nginx -p "$scratch" -c "$PWD/nginx.conf" &
nginx_master=$!
pids+=("$nginx_master")
"$foresee" serve --worker http://127.0.0.1:9100 --listen 127.0.0.1:9103 --admin-listen off \
    --io-threads 1 2>"$scratch/foresee.log" &
foresee_pid=$!
pids+=("$foresee_pid")
for port in 9100 9101 9103; do
    until curl -sf -o /dev/null --max-time 1 "http://127.0.0.1:$port/health"; do sleep 0.1; done
done
nginx_pid=$(cat "/proc/$nginx_master/task/$nginx_master/children")
nginx_pid=${nginx_pid// /}

# Prints the CPU time of all threads of a process, in nanoseconds.
cpu_time() {
    cat /proc/"$1"/task/*/schedstat | awk '{ sum += $1 } END { printf "%.0f\n", sum }'
}

# Prints the microseconds of CPU time per request of the process $1, called at port $2 with kind $3.
measure() {
    local before after requests failed
    before=$(cpu_time "$1")
    read -r requests failed < <(wrk -t1 -c16 -d"${seconds}s" -s chat.lua "http://127.0.0.1:$2" -- "$3" |
        awk '/^result/ { print $2, $3 }')
    after=$(cpu_time "$1")
    if [ "$failed" != 0 ]; then
        echo "$failed of $requests requests failed at port $2" >&2
        exit 1
    fi
    awk -v time=$((after - before)) -v requests="$requests" 'BEGIN { print time / requests / 1000 }'
}

median() {
    sort -n | awk '{ value[NR] = $1 } END { print value[int((NR + 1) / 2)] }'
}

declare -A label=(
    [stream]="stream of 16 events in two reads"
    [slow]="stream of 16 events 5 ms apart"
    [whole]="whole response"
)
printf '%-34s %10s %10s %8s   %s\n' "µs of CPU time per request" Foresee nginx ratio "ratios of the rounds"
for kind in $kinds; do
    nginx_port=9101
    if [ "$kind" = whole ]; then nginx_port=9102; fi
    for target in "$foresee_pid 9103" "$nginx_pid $nginx_port"; do
        # Opens the connections and fills the caches.
        seconds=1 measure $target "$kind" >/dev/null
    done
    : >"$scratch/foresee" >"$scratch/nginx"
    for ((round = 0; round < rounds; round++)); do
        measure "$foresee_pid" 9103 "$kind" >>"$scratch/foresee"
        measure "$nginx_pid" "$nginx_port" "$kind" >>"$scratch/nginx"
    done
    paste "$scratch/foresee" "$scratch/nginx" | awk '{ printf "%.2f\n", $1 / $2 }' >"$scratch/ratios"
    printf '%-34s %10.1f %10.1f %8s   %s\n' "${label[$kind]}" \
        "$(median <"$scratch/foresee")" "$(median <"$scratch/nginx")" "$(median <"$scratch/ratios")" \
        "$(sort -n "$scratch/ratios" | paste -sd ' ')"
done
