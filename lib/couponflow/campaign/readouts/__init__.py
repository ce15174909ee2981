"""What a campaign's mails did: outcomes of two arms, effects with intervals, expected against actual."""
