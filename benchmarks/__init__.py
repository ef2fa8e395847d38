"""Speed, as ratios within one run: `make bench`. docs/benchmarks.md says how to read it.

contenders.py  who is measured: this stack and its peers, behind the same few calls
peers/         one file a peer, and nothing else to add one
drain.py       queued jobs until the last is over      latency.py  from created to started, workers idle
requests.py    POST /api/jobs and batches              load.py     the load generator for it
large.py       a million jobs: --large                 idle.py     what it costs to do nothing: --idle
servers.py     PostgreSQL and Redis for a run          noise.py    what else the machine did meanwhile
report.py      medians, ratios, table, JSON            plot.py     the PNG
"""
