"""The agent: an optional companion that keeps what the plugin has published, and that the plugin never needs.

`memory` is what our processes have published, from their own transactions; `heal` writes again what others delete of
it; `witness` says which attachments libcni still has; `children` do what takes long; `metrics` and `notify` tell of it;
`reserve` holds sockets, `permits` says what is forwarded, `redirect` leads clients there; `main` has the loop. All of
that is asyncio, one thread. `forward` and its `streams` have another, by `poll`. Imports go from `main` down.
"""
