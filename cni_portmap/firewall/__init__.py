"""What everybody's rules do to a packet, without sending one: for doctor and trace, which say who drops what and why.

Pure: `linux.rulesets` has read the rules, `Facts` answers what they ask about this host. A packet may be known in part,
since nobody knows whence the next client comes; so an answer is YES, NO or MAYBE.

    packet.py       a packet, its headers byte by byte, its connection
    expressions.py  nft's expressions: does a rule match, what does it do
    xtables.py      matches and targets of iptables, for iptables-nft and iptables-legacy alike
    walk.py         hooks, chains and verdicts in their order
    journey.py      a connection through all hooks, in both directions
    claims.py       the DNAT rules of others: who publishes a port besides
    text.py         a rule of iptables-legacy as iptables writes it
"""
