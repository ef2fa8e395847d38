"""The ticks of the schedule: every SQL statement that beat sends them by, and that workers claim them by.

A tick is a row (entry, due_at). It fires once because beat may send a message only for a row that it has just written,
and it runs once because a worker must claim that row: messages may get lost, wait, or come twice. As with jobs, all
times are the database's, and no row back means that somebody else was first.
"""

# A task's hard limit, and how long a tick counts as running at most: a run that ended without a word is over by then.
TIME_LIMIT_SECONDS = 120
LOST_SECONDS = 150

# --- beat ----------------------------------------------------------------------------------------------------------

# The time, and each entry's newest tick; in another order every time, so that of two entries that wait for each other
# none is always second. A tick of the future was written by a database whose clock was ahead: it must stop nothing.
LOOK = """
SELECT now(), wanted.entry, tick.due_at,
       tick.started_at IS NOT NULL AS started, tick.finished_at IS NOT NULL AS finished,
       COALESCE(tick.finished_at IS NULL AND
                GREATEST(tick.sent_at, tick.started_at) >= now() - wanted.expires, false) AS under_way
FROM unnest(%(entries)s::text[], %(expires)s::interval[]) AS wanted (entry, expires)
LEFT JOIN LATERAL (
    SELECT * FROM schedule_ticks t WHERE t.entry = wanted.entry AND t.due_at <= now() ORDER BY t.due_at DESC LIMIT 1
) AS tick ON true
ORDER BY random()
"""

# The right to send a tick, for the first time or again. Refused: a tick that somebody sent lately, that is over, or
# that is older than the newest, for a beat that was stopped between its look and this.
FIRE = """
WITH replaced AS (
    DELETE FROM schedule_ticks
    WHERE %(one_row)s AND entry = %(entry)s AND (due_at < %(due_at)s OR due_at > now())
)
INSERT INTO schedule_ticks AS tick (entry, due_at, sent_at)
SELECT %(entry)s, %(due_at)s, now() WHERE NOT EXISTS (
    SELECT FROM schedule_ticks WHERE entry = %(entry)s AND due_at > %(due_at)s AND due_at <= now()
)
ON CONFLICT (entry, due_at) DO UPDATE SET sent_at = now()
WHERE tick.finished_at IS NULL
  AND COALESCE(GREATEST(tick.sent_at, tick.started_at) < now() - %(expires)s, true)
RETURNING sent_at
"""

# Nothing was sent after all, or what was sent found no room: the next round sends it.
SEND_AGAIN = """
UPDATE schedule_ticks SET sent_at = NULL
WHERE entry = %(entry)s AND due_at = %(due_at)s AND started_at IS NULL AND finished_at IS NULL
"""

# --- worker --------------------------------------------------------------------------------------------------------

# Only the newest tick: what an older one would do, that one does. started_at is the fence of the statements below.
CLAIM = """
UPDATE schedule_ticks AS tick SET started_at = now()
WHERE entry = %(entry)s AND due_at = %(due_at)s AND finished_at IS NULL
  AND COALESCE(started_at < now() - make_interval(secs => %(lost)s), true)
  AND NOT EXISTS (
      SELECT FROM schedule_ticks newer
      WHERE newer.entry = tick.entry AND newer.due_at > tick.due_at AND newer.due_at <= now()
  )
RETURNING entry, due_at, started_at
"""

FINISH = """
UPDATE schedule_ticks SET finished_at = now(), result = %(result)s, error = NULL
WHERE entry = %(entry)s AND due_at = %(due_at)s AND started_at = %(started_at)s
"""

# A slice is over and there is more to do: sent again at once.
GO_ON = """
UPDATE schedule_ticks SET sent_at = NULL, started_at = NULL, result = %(result)s
WHERE entry = %(entry)s AND due_at = %(due_at)s AND started_at = %(started_at)s
"""

# Sent again after its patience, unless the next one is due.
FAIL = """
UPDATE schedule_ticks SET sent_at = now(), started_at = NULL, error = %(error)s
WHERE entry = %(entry)s AND due_at = %(due_at)s AND started_at = %(started_at)s
"""

# --- pages ---------------------------------------------------------------------------------------------------------

# A small table: entries that run often keep one row each.
LATEST = """
SELECT entry, due_at, started_at, finished_at, result, error FROM schedule_ticks ORDER BY due_at DESC LIMIT %(limit)s
"""
