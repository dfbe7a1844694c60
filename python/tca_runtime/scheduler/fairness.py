"""Fair shares of the server between clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from tca_runtime.scheduler.request import ClientAccount, Request

# Computing a token of output costs about as much as two of a prompt.
OUTPUT_WEIGHT = 2
# Output that a request pays for at admission; the rest, or a refund, comes when it ends.
PREPAID_OUTPUT = 256
# How far ahead of the others a client may get while its requests suit the cache better.
QUANTUM = 4096


class FairShares:
    """Counts the service that each client has had, and puts clients ahead of their share last.

    Service is counted in prompt tokens computed (cached ones are free) plus ``OUTPUT_WEIGHT`` times
    the tokens generated. A client is within its share while it is less than ``QUANTUM`` ahead of
    the least served client that waits. Among requests within their share the caller's order
    counts, so that locality is used where it costs nobody much; the others follow, least served
    client first. Priorities come before shares.

    Hence, while two clients both have waiting requests of one priority, the service that they were
    admitted to since then differs by less than ``QUANTUM`` plus the largest request of the one
    ahead. A client that comes back is put level with the others: it earns no credit by waiting, and
    none can hold the others up by coming under new names. An empty queue forgives everything.
    """

    def __init__(self) -> None:
        # Of clients that have something waiting, or are ahead of the level.
        self._accounts: dict[str, ClientAccount] = {}
        self._num_waiting = 0
        # What a client that always had something waiting would have been served.
        self._level = 0.0

    def enter(self, request: Request) -> None:
        """A request waits, for the first time or after a retraction."""
        account = self._accounts.setdefault(request.client, ClientAccount(self._level))
        if not account.waiting:
            account.served = max(account.served, self._level)
            self._num_waiting += 1
        account.waiting += 1

    def leave(self, request: Request) -> None:
        """A request waits no longer."""
        account = self._accounts[request.client]
        account.waiting -= 1
        if account.waiting:
            return
        self._num_waiting -= 1
        if self._num_waiting:
            kept = {c: a for c, a in self._accounts.items() if a.waiting or a.served > self._level}
            self._accounts = kept
        else:
            self._accounts = {}
            self._level = 0.0

    def admit(self, request: Request, missing: int) -> None:
        """Charge an admitted request for ``missing`` tokens to compute and some output."""
        if request.account is not self._accounts[request.client]:
            request.account = self._accounts[request.client]
            request.paid_output = request.num_output
        prepaid = request.num_output + _expected_output(request)
        self._charge(request, missing + OUTPUT_WEIGHT * (prepaid - request.paid_output))
        request.paid_output = prepaid

    def settle(self, request: Request) -> None:
        """Charge an ended request for the output it really had, or refund what it had not.

        That goes to the account that paid; if it was closed since, its owner has been put level.
        """
        self._charge(request, OUTPUT_WEIGHT * (request.num_output - request.paid_output))
        request.paid_output = request.num_output

    def candidates(self, requests: Sequence[Request], limit: int) -> list[Request]:
        """At most ``limit`` requests to rank: clients take turns with their oldest ones.

        ``requests`` are in order of arrival.
        """
        if len(requests) <= limit:
            return list(requests)
        turns: Counter[tuple[str, int]] = Counter()
        keys: dict[Request, tuple[int, int, float, int]] = {}
        for request in requests:
            client, priority = request.client, request.message.priority
            turn = turns[client, priority]
            turns[client, priority] += 1
            keys[request] = (-priority, turn, self._accounts[client].served, request.arrival)
        return sorted(requests, key=keys.__getitem__)[:limit]

    def order(
        self,
        requests: Sequence[Request],
        key: Callable[[Request], Any],
        cost: Callable[[Request], int],
    ) -> list[Request]:
        """Requests in the order of admission.

        Parameters
        ----------
        key : the order within the shares, which must begin with the priority
        cost : prompt tokens that a request would have to compute
        """
        ordered = sorted(requests, key=key)
        if len({r.client for r in ordered}) < 2:
            return ordered
        served = {client: account.served for client, account in self._accounts.items()}
        result: list[Request] = []
        for priority in sorted({r.message.priority for r in ordered}, reverse=True):
            queues: dict[str, list[Request]] = {}
            for request in reversed(ordered):
                if request.message.priority == priority:
                    queues.setdefault(request.client, []).append(request)
            while queues:
                limit = min(served[client] for client in queues) + QUANTUM
                heads = {c: key(queue[-1]) for c, queue in queues.items() if served[c] < limit}
                client = min(heads, key=heads.__getitem__)
                request = queues[client].pop()
                served[client] += cost(request) + OUTPUT_WEIGHT * _expected_output(request)
                if not queues[client]:
                    del queues[client]
                result.append(request)
        return result

    def _charge(self, request: Request, amount: float) -> None:
        account = request.account
        if account is not None and self._accounts.get(request.client) is account:
            account.served += amount
            self._level += amount / max(1, self._num_waiting)


def _expected_output(request: Request) -> int:
    return min(request.max_new_tokens - request.num_output, PREPAID_OUTPUT)
