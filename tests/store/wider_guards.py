"""Guards whose stories are tests of their own: pauses, dependencies, groups, owners, avoided nodes, exclusive jobs,
and what sweeps spare.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from fleet_server.domain.job import PauseKey, Priority
from fleet_server.store import Store
from tests.store import test_avoid as avoid
from tests.store import test_dead as dead
from tests.store import test_dependencies as after
from tests.store import test_exclusive as exclusive
from tests.store import test_groups as groups
from tests.store import test_many as many
from tests.store import test_owners as owners
from tests.store import test_pauses as pauses
from tests.store import test_watch as watch
from tests.store.guarding import Guard, Story
from tests.store.making import ManualClock


def told_by(test: Callable[..., Any], **values: Any) -> Story:
    """A test with its parameters as a story."""

    @wraps(test)
    async def story(store: Store, clock: ManualClock) -> None:
        wants_clock = "clock" in inspect.signature(test).parameters
        await (test(store, clock, **values) if wants_clock else test(store, **values))

    return story


one_by_one = told_by(pauses.test_a_job_chosen_by_id_is_held_too)
all_held = told_by(pauses.test_claims_pass_by_what_is_paused, key=PauseKey(), left=set())
one_type = told_by(
    pauses.test_claims_pass_by_what_is_paused, key=PauseKey(job_type="video_gen"), left={"high", "low", "audio"}
)
one_lane = told_by(
    pauses.test_claims_pass_by_what_is_paused, key=PauseKey(priority=Priority.HIGH), left={"low", "video", "audio"}
)
sweeps = told_by(after.test_what_one_step_cannot_reach_the_next_sweeps_do, success=False)
chain = told_by(after.test_a_long_chain_falls_in_bounded_steps)
in_time = told_by(after.test_the_queue_ttl_counts_from_the_submit)
in_line = told_by(after.test_a_job_is_in_line_when_all_before_it_have_succeeded)
failing = told_by(after.test_a_parent_without_success_cancels_whoever_waits, how="failed")
not_back = told_by(after.test_a_retried_parent_does_not_bring_them_back)
again = told_by(after.test_a_retry_waits_again_for_what_has_not_succeeded)
before = told_by(after.test_ends_before_the_submit_count_alike, batch=False)
in_batch = told_by(after.test_ends_before_the_submit_count_alike, batch=True)
unknown = told_by(after.test_an_unknown_parent_is_named)
both = told_by(after.test_a_job_may_wait_for_others_and_for_a_time)
after_all = told_by(after.test_a_parent_that_succeeded_after_all_is_no_longer_waited_for)
given_up = told_by(after.test_a_waiting_job_can_be_cancelled)
never_in_line = told_by(groups.test_a_group_is_never_in_line_and_its_children_are)
last_child = told_by(
    groups.test_the_last_child_ends_the_group, ends=("succeeded", "failed", "succeeded"), expected="failed"
)
cancelled = told_by(
    groups.test_the_last_child_ends_the_group, ends=("succeeded", "cancelled", "succeeded"), expected="cancelled"
)
runs = told_by(groups.test_a_group_runs_from_the_first_start_on)
reached = told_by(groups.test_cancel_reaches_all_children)
taken_up = told_by(groups.test_retry_takes_up_what_did_not_succeed)
child_again = told_by(groups.test_a_child_retried_takes_its_group_along)
not_dead = told_by(groups.test_only_the_group_is_on_the_dead_list)
unlisted = told_by(groups.test_lists_leave_children_out)
stays = told_by(groups.test_a_group_stays_while_a_child_lives)
with_children = told_by(groups.test_a_group_is_purged_with_its_children_once_all_have_ended)
credit = told_by(owners.test_who_could_not_be_served_saves_up_a_bounded_credit)
came_back = told_by(owners.test_leaving_and_coming_back_gains_nothing, name="abe")
newcomer = told_by(owners.test_an_owner_who_was_away_begins_level_with_the_least_served)
two_lanes = told_by(owners.test_many_jobs_in_one_lane_do_not_pass_those_of_others_in_another)
old_turns = told_by(owners.test_many_owners_of_old_turns_are_put_right)
elsewhere = told_by(avoid.test_a_failure_is_tried_on_another_node)
for_a_while = told_by(avoid.test_avoidance_ends)
eight = told_by(avoid.test_eight_are_looked_at)
margin = told_by(exclusive.test_a_lost_one_waits_for_the_margin)
claimed = told_by(exclusive.test_a_claim_that_was_never_started_waits_too)
new_boot = told_by(exclusive.test_a_new_boot_gives_it_back_with_its_lease)
overdue = told_by(exclusive.test_an_overdue_one_is_told_to_stop_first)
may_run = told_by(exclusive.test_what_a_server_gives_back_may_run)
filters = told_by(dead.test_filters_combine)
examined = told_by(dead.test_a_page_examines_a_bounded_number)
redriven = told_by(dead.test_a_redrive_said_twice_is_one)
partly = told_by(many.test_a_claim_under_way_again_takes_only_what_is_missing)
extended = told_by(watch.test_the_jobs_of_a_dead_replicas_agents_get_one_extension)
once = told_by(watch.test_an_attempt_is_extended_once_whoever_dies_next)
alive = told_by(watch.test_a_life_sign_is_good_for_its_whole_time)
anew = told_by(watch.test_a_replica_that_began_anew_is_waited_for_like_a_dead_one)
alone = told_by(watch.test_a_server_alone_extends_nothing_after_its_own_grace)
outlasts = told_by(watch.test_a_lease_that_outlasts_all_that_gets_none)
late_run = told_by(watch.test_an_overdue_run_waits_with_its_lease)
no_shorter = told_by(watch.test_an_extension_never_shortens_a_lease)
given_back = told_by(watch.test_what_a_server_gave_back_is_not_extended)
silent = told_by(watch.test_a_silent_node_is_its_own_replicas_business_while_that_lives)
at_another = told_by(watch.test_a_server_gives_back_nothing_of_a_node_that_is_at_another)
frozen = told_by(watch.test_nothing_is_reassigned_by_any_replica_while_it_lasts)
half_back = told_by(watch.test_it_ends_when_half_are_back_on_whatever_replica)
one_by_one_gone = told_by(watch.test_nodes_that_left_one_by_one_over_a_longer_time_are_none)
not_counted = told_by(watch.test_who_is_back_deleted_or_said_goodbye_is_not_counted)
too_few = told_by(watch.test_more_than_half_of_at_least_ten_nodes_is_a_mass_loss, away=8, known=9, missing=0)

WIDER_GUARDS = [
    Guard("lib/watch", "if j.od or j.ex == j.tk then", "if j.od then", once),
    Guard("lib/watch", "if j.od or j.ex == j.tk then", "if j.od or j.ex then", once),
    Guard("lib/watch", "if j.od or j.ex == j.tk then", "if j.ex == j.tk then", given_back),
    Guard("lib/watch", "  if till <= NOW then\n    return false\n  end\n", "", outlasts),
    Guard("lib/watch", "if till and till < NOW then", "if till then", alive),
    Guard("lib/watch", "if till and till < NOW then", "if false then", extended),
    Guard("lib/watch", "elseif since and since > (tonumber(row[2]) or since) then", "elseif false then", anew),
    Guard("lib/watch", "= since + grace", "= NOW + grace", alone),
    Guard("lib/watch", "last == boot and since or NOW", "since or NOW", anew),
    Guard("lib/watch", "last == boot and since or NOW", "NOW", alive),
    Guard("lib/watch", "K.leases, 'XX', 'GT'", "K.leases, 'XX'", no_shorter),
    Guard("lib/watch", "  redis.call('ZADD', K.deadlines, 'XX', 'GT', int(till - margin), id)\n", "", late_run),
    Guard("node_update", "if value == 'silent' and lives(n.replica) then", "if false then", silent),
    Guard("node_update", "if value == 'silent' and lives(n.replica) then", "if lives(n.replica) then", half_back),
    Guard("lib/watch", "return till and till >= NOW", "return till", silent),
    Guard("release", "if ARGV[7] ~= '' and", "if false and", at_another),
    Guard("reap", "if not hold and missing == 0 then", "if not hold then", frozen),
    Guard("lib/watch", "if since and (not many or NOW - since >= freeze) then", "if since and not many then", frozen),
    Guard("lib/watch", "redis.call('DEL', K.frozen, K.lost)", "redis.call('DEL', K.frozen)", half_back),
    Guard("lib/watch", "  if not since then\n    redis.call('ZREM", "  if true then\n    redis.call('ZREM", frozen),
    Guard(
        "lib/watch",
        "  if not since then\n    redis.call('ZREM",
        "  if false then\n    redis.call('ZREM",
        one_by_one_gone,
    ),
    Guard("lib/watch", "known >= least and ", "", too_few),
    Guard("lib/nodes", "  redis.call('ZREM', K.lost, id)\n", "", half_back),
    Guard("lib/nodes", "  if lost then", "  if true then", not_counted),
    Guard("node_delete", "redis.call('ZREM', K.lost, ARGV[3])\n", "", not_counted),
    Guard("node_update", "  if back then\n    came(id)\n  end\n", "", not_counted),
    Guard("claim", "return not stopped or not stopped[j.pr]", "return true", one_by_one),
    Guard("claim", "local heads, high = heads_of(lane, held)", "local heads, high = heads_of(lane)", one_lane),
    Guard("lib/lanes", "(of_type == '' or of_type == job_type)", "true", one_type),
    Guard("lib/lanes", "(of_cluster == '' or of_cluster == cluster)", "of_cluster == cluster", all_held),
    Guard("lib/lanes", "priority == '' and PRIORITIES or {priority}", "{priority}", all_held),
    Guard("peek", "return not held or not held[priority]", "return true", one_by_one),
    Guard("claim", "or j.kn or", "or", never_in_line),
    Guard("claim", "or j.wr or", "or", in_line),
    Guard("lib/submitted", "j.doomed or state == 'failed' or state == 'cancelled'", "false", before),
    Guard("lib/submitted", "  if j.doomed then", "  if false then", before),
    Guard("lib/submitted", "  if j.doomed then", "  if false then", in_batch),
    Guard("lib/submitted", "    if not state then\n      return number\n    end\n", "", unknown),
    Guard("lib/ends", "    if redis.call('SREM', K.unmet .. id, parent) == 0 then", "    if false then", again),
    Guard("lib/ends", "j.st == 'queued' and j.wr == 'DEPENDENCY' then", "true then", given_up),
    Guard("lib/ends", "if waits > 0 then", "if false then", in_line),
    Guard("lib/ends", "state == 'succeeded' and 's' or 'c'", "'s'", failing),
    Guard("lib/ends", "  while budget > 0 do", "  while true do", sweeps),
    Guard(
        "lib/ends",
        "    budget = budget - 1\n    settle(verdict, parent, next[1])",
        "    settle(verdict, parent, next[1])",
        chain,
    ),
    Guard(
        "lib/ends", "    put_off(entry)\n  end\nend\nlocal function cancel", "  end\nend\nlocal function cancel", sweeps
    ),
    Guard("lib/ends", "if due and due > NOW then", "if false then", both),
    Guard("lib/ends", "{tb = j.tb or j.en, en = NOW}", "{en = NOW}", in_time),
    Guard("lib/ends", "{tb = j.tb or j.en, en = NOW}", "{}", in_line),
    Guard("retry", "ipairs(redis.call('SMEMBERS', K.unmet .. id))", "ipairs({})", again),
    Guard("retry", "if state == 'succeeded' then", "if false then", after_all),
    Guard("retry", "doomed = doomed or state ~= 'queued' and state ~= 'running'", "doomed = false", again),
    Guard("lib/ends", "  if j.gj then\n    child_ended(j.gj)\n  end\n", "", last_child),
    Guard("lib/ends", "  if g.kl > 0 then", "  if false then", last_child),
    Guard("lib/ends", "    if end_of[1] == 'failed' then", "    if false then", last_child),
    Guard("lib/ends", "    elseif end_of[1] == 'cancelled' then", "    elseif false then", cancelled),
    Guard("lib/ends", "if not g or g.st ~= 'queued' and g.st ~= 'running' then", "if not g then", reached),
    Guard("lib/ends", "  if j.kn and tonumber(j.kl) > 0 then", "  if false then", reached),
    Guard(
        "lib/ends",
        "  if not j.gj then\n    list(K.ended",
        "  if true then\n    list(K.ended",
        not_dead,
    ),
    Guard("lib/jobs", "(j.gj and K.child_state or K.state)", "(K.state)", unlisted),
    Guard("lib/jobs", "if g and g.st == 'queued' then", "if g then", runs),
    Guard("lib/ends", "    if all then", "    if true then", stays),
    Guard(
        "lib/ends", "      for _, child in ipairs(children) do\n        forget(child)\n      end\n", "", with_children
    ),
    Guard("retry", "(c.st == 'failed' or c.st == 'cancelled')", "(c.st == 'failed')", taken_up),
    Guard("retry", "(c.st == 'failed' or c.st == 'cancelled')", "true", taken_up),
    Guard("retry", "if group and group.st == 'failed' then", "if false then", child_again),
    Guard("retry", "  redis.call('HINCRBY', K.job .. j.gj, 'kl', 1)\n", "", child_again),
    Guard(
        "retry", "if group and (group.st == 'cancelled' or group.st == 'succeeded') then", "if false then", child_again
    ),
    Guard("retry", "if j.ro == operation then", "if false then", redriven),
    Guard("lib/owners", "at - CREDIT)\n  end\n  redis", "0)\n  end\n  redis", credit),
    Guard("lib/owners", "math.max(tonumber(first[2]), tonumber(last[2]) - CREDIT)", "tonumber(first[2])", credit),
    Guard("lib/owners", "    redis.call('ZADD', K.rested .. cluster, at, owner)\n", "", came_back),
    Guard("lib/owners", "at or 0, owner)\n  return", "0, owner)\n  return", newcomer),
    Guard("lib/owners", "    if tonumber(at) <= tonumber(two[2]) then", "    if true then", two_lanes),
    Guard("lib/owners", "for _ = 1, 64 do", "for _ = 1, 2 do", old_turns),
    Guard("claim", "      if not avoided(id) then", "      if true then", elsewhere),
    Guard("claim", "known[1] == node and", "known[1] and", elsewhere),
    Guard("claim", "and tonumber(known[2]) > NOW", "", for_a_while),
    Guard("claim", "      budget = budget - 1\n", "", eight),
    Guard("lib/base", "NOW + tonumber(lease) + (exclusive and EXCLUSIVE_MARGIN or 0)", "NOW + tonumber(lease)", margin),
    Guard("renew", "lease_end(ARGV[3], known[6])", "lease_end(ARGV[3])", margin),
    Guard("claim", "lease_end(lease, j.xc)", "lease_end(lease)", claimed),
    Guard("lose_session", "and not j.xc and", "and", new_boot),
    Guard("renew", "and not known[7] then", "then", overdue),
    Guard("reap", "    if j.xc then", "    if false then", overdue),
    Guard("reap", "    if j.od == 'T' then", "    if false then", overdue),
    Guard("reap", "    elseif j.od == 'R' then", "    elseif false then", may_run),
    Guard("release", "if j.xc and ARGV[6] ~= '1' then", "if false then", may_run),
    Guard("release", "if j.xc and ARGV[6] ~= '1' then", "if j.xc then", may_run),
    Guard("dead", "as_wanted(known[3] or '', ARGV[10])", "true", filters),
    Guard("dead", "as_wanted(job_type, ARGV[7])", "true", filters),
    Guard("dead", "as_wanted(cluster, ARGV[8])", "true", filters),
    Guard("dead", "as_wanted(known[2] or '', ARGV[9])", "true", filters),
    Guard("dead", "if #rows == 2 * examine then", "if false then", examined),
    Guard("claim", "  if mine then", "  if false then", partly),
]
"""What is taken out, and the test that must not pass without it."""
